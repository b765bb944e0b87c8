"""Comba:  M ← e^g M − b β kᵀ(k M) + β kᵀv,  o = (q − d k) M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); g (B, T, HV), log decay, ≤ 0; beta (B, T, HV), write strength, in (0, 1);
b (HV,), how much of what is at the key is taken out, in (0, 1); d (HV,), output correction. The memory is read before its decay.
Hu et al. 2025, "Comba: Improving Bilinear RNNs with Closed-loop Control" (arXiv 2506.02475), eq. 5 with β̃ = b β.
"""

from lsmc import LSM, M, Scalar, k, outer, q, scalar, v

beta, b, d = scalar("beta"), scalar("b", per="head"), scalar("d", per="head")
comba = LSM("comba", decay=Scalar("g"), update=beta * outer(k, v - b * (k @ M)), readout=(q - d * k) @ M)
