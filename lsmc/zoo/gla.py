"""Gated linear attention:  M ← diag(e^g) M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0.
Yang et al. 2023, "Gated Linear Attention Transformers" (arXiv 2312.06635), eq. 3.
"""

from lsmc import LSM, Vector, k, outer, v

gla = LSM("gla", decay=Vector("g"), update=outer(k, v))
