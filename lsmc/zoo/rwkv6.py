"""RWKV6:  o = q (M + diag(u) kᵀv),  then  M ← diag(e^g) M + kᵀv.

q, k (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0; u (HV, K), bonus of the present token.
The output is read before the update.
Peng et al. 2024, "Eagle and Finch" (arXiv 2404.05892), eq. 19–20.
"""

from lsmc import LSM, M, Vector, k, outer, q, v, vector

u = vector("u", per="head")
rwkv6 = LSM("rwkv6", decay=Vector("g"), update=outer(k, v), readout=q @ (M.previous + outer(u * k, v)))
