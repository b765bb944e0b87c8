"""S4 with a complex diagonal:  M ← e^{dt ⊗ (A + i omega)} ⊙ M + dt ⊙ bᵀv,  o = Re(c M) + D ⊙ v.

v (B, T, HV, V); b, c (HV, K), input and output matrices; dt (HV, V), step, > 0; A (HV, K, V), ≤ 0, and omega (HV, K, V), real and
imaginary part of the diagonal; D (HV, V), skip. The state is the pair (real part, imaginary part). `s4` has a real diagonal.
Gu, Goel and Ré 2021, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396); the diagonal
form of Gu et al. 2022 (arXiv 2206.11893), discretised as Mamba is.
"""

from lsmc import LSM, M, Matrix, Rotation, matrix, outer, v, vector

b, c = vector("b", per="head"), vector("c", per="head")
dt, D = vector("dt", over="V", per="head"), vector("D", over="V", per="head")
decay = Matrix(dt * matrix("A", per="head")) * Rotation(dt * matrix("omega", per="head"))
s4_complex = LSM("s4_complex", decay=decay, update=outer(b, dt * v), readout=c @ M + D * v)
