"""The models behind the folders that version 0.1 saved."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.body(self.norm(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 3, padding=1)
        self.join = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x):
        return self.join(torch.cat([self.left(x).relu(), self.right(x)], 1))


example_inputs = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
