"""What a decoding step costs on the present device, measured or estimated (docs/planning.md)."""

from specsa_jax.planning.costs import Costs, measure_bandwidth
from specsa_jax.planning.profile import Point, Profile, ProfileError, default_path, load, save

__all__ = ["Costs", "Point", "Profile", "ProfileError", "default_path", "load", "measure_bandwidth", "save"]
