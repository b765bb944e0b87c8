"""Mamba2:  M ← e^{A dt} M + dt kᵀv,  o = q M + D v.

q, k (B, T, H, K), the paper's C and B; v (B, T, HV, V), its x; dt (B, T, HV), step size, ≥ 0; A (HV,) ≤ 0; D (HV,), skip.
Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), eq. 1 with scalar A and zero-order hold of A alone.
"""

from lsmc import LSM, M, Scalar, k, outer, q, scalar, v

A, D = scalar("A", per="head"), scalar("D", per="head")
dt = scalar("dt")
mamba2 = LSM("mamba2", decay=Scalar(A * dt), update=dt * outer(k, v), readout=q @ M + D * v)
