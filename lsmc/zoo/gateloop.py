"""GateLoop:  M ← diag(e^{g + iθ}) M + kᵀv,  o = Re(q M).

q, k (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0; theta (B, T, HV, K), phase, any angle.
The state is the pair (real part, imaginary part). `gateloop_real` is the method without phases.
Katsch 2023, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling" (arXiv 2311.01927), eq. 4.
"""

from lsmc import LSM, Rotation, Vector, k, outer, v

gateloop = LSM("gateloop", decay=Vector("g") * Rotation("theta"), update=outer(k, v))
