"""S4 with a real diagonal:  M ← e^{dt ⊗ A} ⊙ M + dt ⊙ bᵀv,  o = c M + D ⊙ v.

v (B, T, HV, V); b, c (HV, K), input and output matrices; dt (HV, V), step, > 0; A (HV, K, V), ≤ 0; D (HV, V), skip. Nothing
but v varies in time. `s4_complex` has a complex diagonal.
Gu, Goel and Ré 2021, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396); the diagonal
form of Gu et al. 2022 (arXiv 2206.11893), discretised as Mamba is.
"""

from lsmc import LSM, M, Matrix, matrix, outer, v, vector

b, c = vector("b", per="head"), vector("c", per="head")
dt, D = vector("dt", over="V", per="head"), vector("D", over="V", per="head")
s4 = LSM("s4", decay=Matrix(dt * matrix("A", per="head")), update=outer(b, dt * v), readout=c @ M + D * v)
