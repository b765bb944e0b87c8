"""Gated DeltaNet:  M' = e^g M,  M ← M' + β kᵀ(v − k M'),  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); g (B, T, HV), log decay, ≤ 0; beta (B, T, HV) in [0, 2).
The error is read from the decayed memory.
Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks" (arXiv 2412.06464), eq. 10.
"""

from lsmc import LSM, M, Scalar, k, outer, scalar, v

beta = scalar("beta")
gated_deltanet = LSM("gated_deltanet", decay=Scalar("g"), update=beta * outer(k, v - k @ M.decayed))
