import dataclasses, jax, numpy as np, jax.numpy as jnp, sys
sys.path.insert(0,'.')
from pallas_kernels.attention import AttentionConfig, Branch, Launch, branches, selection, specs
from pallas_kernels.attention.arguments import check
spec=next(s for s in specs.TESTS if s.name=="chain-8")
q,g,lay,pt,ln,tail=spec.arguments()
shape=check(spec.sparsity,q,g,lay,pt,ln,tail)
def parts(tile,st,interp,rows=16):
    cfg=AttentionConfig(group=8,compressed=Branch(rows,3),selected=Branch(rows,2),window=Branch(rows,2),tile=tile,num_stages=st)
    def f(q,lay,pt,ln,tail):
        L=Launch(spec.sparsity,shape,cfg,(0,2),scored=True,interpret=interp)
        p=branches.run(L,q,lay,pt,ln,tail,None)
        s=selection.run(L,p,pt,ln,tail)
        L2=Launch(spec.sparsity,shape,cfg,(1,),interpret=interp)
        r=branches.run(L2,q,lay,pt,ln,tail,s)
        return p["out"],p["lse"],s.ids,s.pages,s.owners,s.size,r["out"],r["lse"]
    return [np.asarray(x) for x in jax.jit(f)(q,lay,pt,ln,tail)]
print(shape, spec.lengths, spec.dtype)
for tile in (128,64):
    a=parts(tile,5,True)
    for st in (3,4,5,5):
        b=parts(tile,st,False)
        for n,x,y in zip(("c.out","c.lse","ids","pages","owners","size","s.out","s.lse"),a,b):
            if n in("pages","owners"):
                w=np.broadcast_to(np.arange(x.shape[-1])<(a[5][...,None,None] if n=="owners" else a[5][...,None]),x.shape); x=np.where(w,x,0); y=np.where(w,y,0)
            x=np.where(np.isfinite(x),x,0); y=np.where(np.isfinite(y),y,0)
            bad=np.argwhere(np.abs(x-y)>1e-4*max(1,np.abs(x).max()))
            if len(bad): print(tile,st,n,x.shape,len(bad),bad[:6].tolist(),float(np.abs(x-y).max()))
    print(tile,"done",flush=True)
