"""GateLoop with real gates:  M ← diag(e^g) M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0.
Katsch 2023, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling" (arXiv 2311.01927), eq. 4, phases 0.
"""

from lsmc import LSM, Vector, k, outer, v

gateloop_real = LSM("gateloop_real", decay=Vector("g"), update=outer(k, v))
