"""Longhorn:  M ← (1 − k²ᵀΔ) ⊙ M + kᵀ(Δ ⊙ v)  with  Δ = β / (1 + β ‖k‖²),  o = q M + D ⊙ v.

q, k (B, T, H, K); v (B, T, HV, V); beta (B, T, HV, V), step, in (0, 1); D (HV, V), skip. Every channel of v learns by a step
of its own, an implicit one, so that the memory grows for no β > 0; of its matrix I − Δ kᵀk the diagonal is kept.
Liu et al. 2024, "Longhorn: State Space Models are Amortized Online Learners" (arXiv 2407.14207), in the
diagonal form of its code.
"""

from lsmc import LSM, M, Matrix, k, log1p, norm2, outer, q, square, v, vector

beta, D = vector("beta", over="V"), vector("D", over="V", per="head")
delta = beta / (1 + beta * norm2(k))
longhorn = LSM(
    "longhorn", decay=Matrix(log1p(-outer(square(k), delta))), update=outer(k, delta * v), readout=q @ M + D * v
)
