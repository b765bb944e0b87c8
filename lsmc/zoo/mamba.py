"""Mamba:  M ← e^{dt ⊗ A} ⊙ M + dt ⊙ kᵀv,  o = q M + D ⊙ v.

q, k (B, T, H, K), called C and B in the paper; v (B, T, HV, V), the channels; dt (B, T, HV, V), step, > 0; A (HV, K, V),
≤ 0; D (HV, V), skip.
Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), algorithm 2.
"""

from lsmc import LSM, M, Matrix, k, matrix, outer, q, v, vector

dt, D = vector("dt", over="V"), vector("D", over="V", per="head")
mamba = LSM("mamba", decay=Matrix(dt * matrix("A", per="head")), update=outer(k, dt * v), readout=q @ M + D * v)
