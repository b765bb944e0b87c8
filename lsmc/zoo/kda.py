"""Kimi delta attention:  M' = diag(e^g) M,  M ← M' + β kᵀ(v − k M'),  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0; beta (B, T, HV) in [0, 2).
The error is read from the decayed memory.
Kimi Team 2025, "Kimi Linear" (arXiv 2510.26692), eq. 1.
"""

from lsmc import LSM, M, Vector, k, outer, scalar, v

beta = scalar("beta")
kda = LSM("kda", decay=Vector("g"), update=beta * outer(k, v - k @ M.decayed))
