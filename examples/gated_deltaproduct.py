"""Gated DeltaProduct, two Householder steps for each token:  M₁ = e^g M + β₁ kᵀ(v − k e^g M),  M ← M₁ + β₂ k₂ᵀ(v₂ − k₂ M₁),
o = q M.

q, k (B, T, H, K), k2 (B, T, HV, K), both keys of norm 1; v, v2 (B, T, HV, V); g (B, T, HV), log decay, ≤ 0; beta, beta2
(B, T, HV) in [0, 2]. The second step reads what the first has written.
Siems et al. 2025, "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products" (arXiv 2502.10297), its
gated form with n_h = 2, the gate before the first step.
"""

from lsmc import LSM, M, Scalar, k, outer, scalar, v, vector

beta, beta2, k2, v2 = scalar("beta"), scalar("beta2"), vector("k2"), vector("v2", over="V")
first = M.decayed + beta * outer(k, v - k @ M.decayed)
second = first + beta2 * outer(k2, v2 - k2 @ first)
gated_deltaproduct = LSM("gated_deltaproduct", decay=Scalar("g"), recurrence=second)
