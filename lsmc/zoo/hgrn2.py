"""HGRN2:  M ← diag(e^g) M + (1 − e^g)ᵀ v,  o = q M.

q (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0. The key is what the decay forgets: there is no k.
Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904), eq. 7.
"""

from lsmc import LSM, Vector, expm1, outer, v, vector

g = vector("g")
hgrn2 = LSM("hgrn2", decay=Vector(g), update=outer(-expm1(g), v))
