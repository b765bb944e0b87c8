"""Rodimus:  M ← diag(e^{−γ ⊙ τ}) M + (γ^τ ⊙ k)ᵀ v,  o = q M + D ⊙ x.

q, k (B, T, H, K), k of norm 1; v (B, T, HV, V), the gated values; log_gamma (B, T, HV, K), logarithm of the selection gate
γ > 0, published as a softplus; tau (B, T, HV, K), temperature, in (0, 1); x (B, T, HV, V), what the values were before their
gate, behind a short convolution; D (HV, V), skip. What is selected is forgotten and written by one gate, tempered by τ.
He et al. 2024, "Rodimus*: Breaking the Accuracy-Efficiency Trade-Off with Efficient Attentions" (arXiv 2410.06577), the
data-dependent tempered selection.
"""

from lsmc import LSM, M, Vector, exp, k, outer, q, v, vector

log_gamma, tau, x, D = vector("log_gamma"), vector("tau"), vector("x", over="V"), vector("D", over="V", per="head")
write = outer(exp(tau * log_gamma) * k, v)
rodimus = LSM("rodimus", decay=Vector(-tau * exp(log_gamma)), update=write, readout=q @ M + D * x)
