"""A whole training tail in float64 and plain PyTorch, written apart from the library, as the oracle of tests."""

import torch
from torch import nn


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                grad = p.grad.neg() if group["maximize"] else p.grad
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(grad, average, beta1).sign(), alpha=float(group["lr"]))
                average.lerp_(grad, 1 - beta2)


class LAMB(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, maximize=False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                grad = p.grad.neg() if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m"].lerp_(grad, 1 - beta1)
                state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                m = state["m"] / (1 - beta1 ** state["t"])
                v = state["v"] / (1 - beta2 ** state["t"])
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                norms = p.norm(), update.norm()
                trust = norms[0] / norms[1] if min(norms) > 0 else 1.0
                p.sub_(update * group["lr"] * trust)


class Oracle:
    """Unscale, clip by value and by norm, step, average: each by PyTorch's own function, in float64."""

    def __init__(self, name, options, tensors, *, max_grad_norm=None, max_grad_value=None, ema_decay=None):
        self.params = [nn.Parameter(t.to(torch.float64, copy=True)) for t in tensors]
        algorithm = {"Lion": Lion, "LAMB": LAMB}.get(name) or getattr(torch.optim, name)
        self.optimizer = algorithm(self.params, **options)
        self.max_grad_norm, self.max_grad_value, self.ema_decay = max_grad_norm, max_grad_value, ema_decay
        self.ema = [p.detach().clone() for p in self.params]
        self.grad_norm = None

    def step(self, grads, scale=1.0):
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.to(torch.float64, copy=True) / scale
        if self.max_grad_value is not None:
            nn.utils.clip_grad_value_(self.params, self.max_grad_value)
        if self.max_grad_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        self.optimizer.step()
        if self.ema_decay is not None:
            for average, p in zip(self.ema, self.params, strict=True):
                average.lerp_(p.detach(), 1 - self.ema_decay)
