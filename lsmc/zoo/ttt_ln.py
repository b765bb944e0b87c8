"""Test-time training, linear with layer norm:  y = k M⁰ + m⁰,  ∂ = ∇_y ½‖w ⊙ LN(y) + b − (v − k)‖²,
M ← M − η kᵀ∂,  m ← m − η ∂,  o = q + w ⊙ LN(q M + m) + b.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V), V = K; eta (B, T, HV), learning rate, ≥ 0; w, b (HV, V). M⁰, m⁰ are M, m at the
start of the present block of 16 tokens, whose gradients are taken together. LN has eps 1e-6. The state is the tuple (M, m, M⁰,
m⁰, tokens of the block so far). `ttt_ln_sequential` takes each gradient at the memory before its token.
Sun et al. 2024, "Learning to (Learn at Test Time)" (arXiv 2407.04620), TTT-Linear with mini-batches of 16: f(x) = x + LN(x W + b).
"""

from lsmc import LSM, M, grad, k, layernorm, norm2, over, q, scalar, v, vector

eta, w, b = scalar("eta"), vector("w", over="V", per="head"), vector("b", over="V", per="head")
loss = norm2(w * layernorm(k @ M + M.bias) + b - (v - over(k, "V"))) / 2
readout = over(q, "V") + w * layernorm(q @ M + M.bias) + b
ttt_ln = LSM("ttt_ln", block=16, update=-eta * grad(loss, M), readout=readout)
