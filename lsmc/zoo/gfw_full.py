"""Gated fast weights with gates of full rank:  M ← A ⊙ M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); A (B, T, HV, K, V), a factor in (0, 1] for every entry. `gfw` is the method with gates of
rank one.
Mao 2022, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights" (arXiv 2210.04243).
"""

from lsmc import LSM, Matrix, k, log, matrix, outer, v

gfw_full = LSM("gfw_full", decay=Matrix(log(matrix("A"))), update=outer(k, v))
