"""Gated fast weights with gates of rank one:  M ← (e^{gk}ᵀ e^{gv}) ⊙ M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); gk (B, T, HV, K), gv (B, T, HV, V), log decays, ≤ 0. `gfw_full` has
gates of full rank.
Mao 2022, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights" (arXiv 2210.04243), eq. 5.
"""

from lsmc import LSM, Vector, k, outer, v

gfw = LSM("gfw", decay=Vector("gk") * Vector("gv", over="V"), update=outer(k, v))
