import dataclasses, sys, time, json, math, os, glob, tempfile, collections, shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0,'benchmarks')
import verify_layer as V
from pallas_kernels.attention import AttentionConfig, Branch, attend, specs
R=dataclasses.replace
def compile_loop(step,state,buffers,iters):
    @partial(jax.jit,donate_argnums=0)
    def loop(state,buffers):
        def body(_,s):
            for b in buffers: s=step(s,b)
            return s
        return jax.lax.fori_loop(0,iters,body,state)
    return loop.lower(state,buffers).compile()
def traced(c,state,buffers,steps):
    s=jax.block_until_ready(c(jax.tree.map(jnp.copy,state),buffers))
    d=tempfile.mkdtemp()
    with jax.profiler.trace(d): s=jax.block_until_ready(c(s,buffers))
    pd=jax.profiler.ProfileData.from_file(glob.glob(d+'/**/*.xplane.pb',recursive=True)[0])
    shutil.rmtree(d)
    t=collections.defaultdict(list); span=[1e30,0]
    for pl in pd.planes:
        if 'GPU' not in pl.name: continue
        for l in pl.lines:
            if 'Stream' not in l.name: continue
            for e in l.events:
                t[e.name].append(e.duration_ns); span=[min(span[0],e.start_ns),max(span[1],e.start_ns+e.duration_ns)]
    out={k:sum(v)/1e3/steps for k,v in t.items()}
    out["span"]=(span[1]-span[0])/1e3/steps
    return out
def case(batch,width,group,cfgs,pool,heads=(32,8),ctx=64,bufs=4,reuse=True):
    spec=specs.benchmark(batch,width,1024*ctx,heads,.7); sp=spec.sparsity; shape=spec.shape
    base=AttentionConfig.heuristic(sp,shape,group)
    first=spec.arguments()
    out,sel=jax.jit(lambda a: attend(sp,*a,config=base))(first)
    by=V.needed_bytes(spec,np.asarray(sel.ids)); floor=by/4.3e6
    n=max(1,min(bufs,math.ceil(120e6/by)))
    buffers=[first,*(spec.arguments(i) for i in range(1,n))]
    sels=[jax.jit(lambda a: attend(sp,*a,config=base))(b)[1] for b in buffers]
    iters=max(1,20//n)
    print(f"== B{batch} T{width} C{group} ctx{ctx} {heads} floor {floor:.1f} n {n} {base}",flush=True)
    def C(k):
        cfg=base
        if 'crows' in k: cfg=R(cfg,compressed=R(cfg.compressed,rows=k['crows']),window=R(cfg.window,rows=k['crows']))
        if 'srows' in k: cfg=R(cfg,selected=R(cfg.selected,rows=k['srows']))
        if 'cs' in k: cfg=R(cfg,compressed=R(cfg.compressed,splits=k['cs']+1))
        if 'ss' in k: cfg=R(cfg,selected=R(cfg.selected,splits=k['ss']+1))
        if 'ws' in k: cfg=R(cfg,window=R(cfg.window,splits=k['ws']))
        for f,n in (('tile','tile'),('st','num_stages'),('sw','selection_warps')):
            if f in k: cfg=R(cfg,**{n:k[f]})
        return cfg
    jobs=[(k,(lambda l,a,c=C(k): V.link(l,attend(sp,*V.with_lengths(a,l),config=c)[0])),buffers) for k in cfgs]
    if reuse: jobs+=[({"reuse":1},(lambda l,b: V.link(l,attend(sp,*V.with_lengths(b[0],l),selected=b[1],config=base)[0])),list(zip(buffers,sels)))]
    t=time.time()
    def comp(j):
        try: return compile_loop(j[1],first[4],j[2],iters)
        except Exception as e: return repr(e)[:200]
    cs=list(pool.map(comp,jobs)); print("compiled",len(jobs),round(time.time()-t,1),flush=True)
    for j,c in zip(jobs,cs):
        if isinstance(c,str): print(j[0],c); continue
        r=traced(c,first[4],j[2],iters*n)
        print("  ".join(f"{k.replace('nsa_','')[:26]} {v:.1f}" for k,v in sorted(r.items(),key=lambda t:-t[1])[:7]),"|",j[0],flush=True)
if __name__=="__main__":
    pool=ThreadPoolExecutor(14)
    which=sys.argv[1].split(",")
    g=[{},dict(st=3),dict(st=7,cs=4,ss=4),dict(cs=8,ss=8,sw=2),dict(cs=4,ss=4,sw=8),dict(cs=5,ss=5,sw=1),dict(crows=64,srows=64,tile=64,cs=4,ss=4),dict(crows=64,srows=64,tile=64,cs=2,ss=2),dict(tile=64,st=3),dict(tile=64,cs=4,ss=4),dict(crows=16,srows=16)]
    if "a" in which: case(8,8,8,g,pool)
    if "c" in which: case(1,8,8,[{},dict(cs=16,ss=16,sw=2),dict(cs=32,ss=24,sw=8),dict(cs=48,ss=12),dict(tile=64),dict(crows=64,srows=64,tile=64)],pool)
    if "b" in which: case(32,8,8,[{},dict(cs=1,ss=1,sw=2),dict(cs=3,ss=3,sw=1),dict(cs=4,ss=4,sw=8),dict(tile=64),dict(crows=64,srows=64,tile=64),dict(st=7)],pool)
    if "d" in which: case(32,16,16,[{},dict(cs=1,ss=1,sw=2),dict(cs=4,ss=4,sw=2),dict(tile=64),dict(tile=64,cs=1,ss=1),dict(tile=64,cs=4,ss=4)],pool)
    if "e" in which: case(1,64,16,[{}],pool)
    if "f" in which: case(8,8,1,[{}],pool)
