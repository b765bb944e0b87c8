"""Test-time training, linear:  M ← M − η ∇½‖kM − v‖²,  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); eta (B, T, HV), learning rate, in [0, 2).
Sun et al. 2024, "Learning to (Learn at Test Time)" (arXiv 2407.04620), eq. 1 and 3, a gradient step for every token.
"""

from lsmc import LSM, M, grad, k, norm2, scalar, v

eta = scalar("eta")
ttt = LSM("ttt", update=-eta * grad(norm2(k @ M - v) / 2, M))
