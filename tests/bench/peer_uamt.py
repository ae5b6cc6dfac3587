"""The peer: UA-MT's step as its public code writes it (BASELINES section 2)."""

from __future__ import annotations

import torch
from torch.nn import functional

from distseg.data.batch import Batch
from distseg.training.step import Learner


def peer_uamt_step(learner: Learner, batch: Batch) -> None:
    """`repeat`, a Python loop over passes, fp32, autograd left to `no_grad`, cross-entropy and Dice from a softmax
    each, the moving average parameter by parameter."""
    student, teacher = learner.student, learner.teacher
    slots = len(batch.slots)
    images = torch.cat([batch.labelled_image, batch.unlabelled_image])
    logits = student(images).logits
    unlabelled = batch.unlabelled_image
    teacher.train()
    with torch.no_grad():
        noise = torch.clamp(torch.randn_like(unlabelled) * 0.1, -0.2, 0.2)
        target = torch.softmax(teacher(unlabelled + noise).logits, 1)
        repeated = unlabelled.repeat(2, 1, 1, 1, 1)
        preds = torch.zeros(8 * slots, *logits.shape[1:], device=logits.device)
        for i in range(4):
            noisy = repeated + torch.clamp(torch.randn_like(repeated) * 0.1, -0.2, 0.2)
            preds[2 * slots * i : 2 * slots * (i + 1)] = teacher(noisy).logits
        preds = torch.softmax(preds, 1).reshape(8, slots, *logits.shape[1:]).mean(0)
        uncertainty = -1.0 * torch.sum(preds * torch.log(preds + 1e-6), dim=1, keepdim=True)
    teacher.eval()
    labelled = logits[:slots]
    soft = torch.softmax(labelled, 1)[:, 1]
    truth = (batch.labelled_target == 1).float()
    dice = 1 - (2 * (soft * truth).sum() + 1e-5) / ((soft * soft).sum() + truth.sum() + 1e-5)
    loss = 0.5 * (functional.cross_entropy(labelled, batch.labelled_target) + dice)
    mask = (uncertainty < 0.6).float()
    distance = (torch.softmax(logits[slots:], 1) - target) ** 2
    loss = loss + 0.05 * torch.sum(mask * distance) / (2 * torch.sum(mask) + 1e-16)
    learner.gradients.zero()
    loss.backward()
    learner.optimizer.step()
    with torch.no_grad():
        for ema, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            ema.mul_(0.99).add_(parameter, alpha=0.01)
