"""Titans without momentum:  M ← (1 − α) M − θ ∇½‖kM − v‖²,  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); alpha (B, T, HV), forgetting, in [0, 1); theta (B, T, HV), learning
rate, in [0, 1]. The gradient is taken at the memory before it forgets.
Behrouz, Zhong and Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), eq. 8 and 13 with η = 0.
"""

from lsmc import LSM, M, Scalar, grad, k, log1p, norm2, scalar, v

alpha, theta = scalar("alpha"), scalar("theta")
titans_plain = LSM("titans_plain", decay=Scalar(log1p(-alpha)), update=-theta * grad(norm2(k @ M - v) / 2, M))
