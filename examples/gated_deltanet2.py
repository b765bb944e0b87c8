"""Gated DeltaNet-2:  M' = diag(e^g) M,  M ← M' + kᵀ(w ⊙ v − (b ⊙ k) M'),  o = q M.

q, k (B, T, H, K), k of norm 1; v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0; b (B, T, HV, K), what is erased, and
w (B, T, HV, V), what is written, in (0, 1). With b = w = β it is a delta rule whose memory decays along K.
Hatamizadeh, Choi and Kautz 2026, "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention" (arXiv 2605.22791).
"""

from lsmc import LSM, M, Vector, k, outer, v, vector

b, w = vector("b"), vector("w", over="V")
gated_deltanet2 = LSM("gated_deltanet2", decay=Vector("g"), update=outer(k, w * v - (b * k) @ M.decayed))
