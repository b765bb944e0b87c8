"""Titans:  P ← η P − θ ∇½‖kM − v‖²,  M ← (1 − α) M + P,  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); alpha (B, T, HV), forgetting, in [0, 1); eta (B, T, HV), momentum, in
(0, 1]; theta (B, T, HV), learning rate, in [0, 1]. The gradient is taken at the memory before it forgets. The state is the
pair (M, P). `titans_plain` is the method without momentum.
Behrouz, Zhong and Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), eq. 13 and 14.
"""

from lsmc import LSM, M, Scalar, grad, k, log, log1p, norm2, scalar, v

alpha, eta, theta = scalar("alpha"), scalar("eta"), scalar("theta")
titans = LSM(
    "titans",
    decay=Scalar(log1p(-alpha)),
    momentum=Scalar(log(eta)),
    update=-theta * grad(norm2(k @ M - v) / 2, M),
)
