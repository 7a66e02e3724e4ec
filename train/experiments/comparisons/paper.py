"""The figures that the paper prints (arXiv 2606.21497 v1), for tables that set ours beside them."""

from __future__ import annotations

#: epochs of its runs, by table
EPOCHS = {"language": 10, "digits over time": 200, "digits over depth": 100, "images": 500}

#: perplexity on WikiText-103 by blocks: backprop (a model for each depth), the tree; width 768, context 1,024
LANGUAGE = {1: (32.78, 34.22), 2: (23.41, 24.08), 3: (20.99, 21.98), 7: (18.17, 22.22)}

#: accuracy on MNIST by (layers, units): backprop, the tree on all layers
MLP = {
    (4, 50): (96.68, 97.20), (4, 100): (97.29, 97.66), (4, 500): (97.98, 98.32),
    (8, 50): (95.37, 97.08), (8, 100): (96.82, 97.60), (8, 500): (96.39, 98.02),
    (16, 50): (11.32, 94.76), (16, 100): (11.32, 95.52), (16, 500): (11.32, 97.09),
}  # fmt: skip

#: accuracy by (cell, whether permuted) and N: deployed cell, tree, BPTT; hidden width 2,048
DIGITS_OVER_TIME = {
    ("gru", False): {
        2: (98.7, 98.6, 98.6), 4: (98.6, 98.6, 98.4), 8: (98.6, 98.6, 98.6), 16: (98.7, 98.7, 98.4),
        32: (98.6, 98.7, 98.8), 64: (98.2, 98.7, 98.8), 128: (98.1, 98.7, 98.7), 256: (97.7, 98.7, 98.6),
    },
    ("elman", False): {
        2: (98.7, 98.7, 98.6), 4: (98.4, 98.7, 98.5), 8: (98.4, 98.6, 98.5), 16: (98.4, 98.6, 98.4),
        32: (98.5, 98.7, 98.1), 64: (98.0, 98.7, 97.9),
    },
    ("gru", True): {
        2: (98.7, 98.6, 98.6), 4: (98.5, 98.7, 98.4), 8: (98.6, 98.6, 98.4), 16: (98.5, 98.5, 98.1),
        32: (98.3, 98.6, 97.6), 64: (97.9, 98.7, 96.8), 128: (97.3, 98.7, 95.9), 256: (95.1, 98.7, 95.3),
    },
    ("elman", True): {
        2: (98.4, 98.4, 98.5), 4: (98.4, 98.4, 98.2), 8: (98.3, 98.4, 98.3), 16: (98.2, 98.5, 98.2),
        32: (98.1, 98.4, 97.5), 64: (97.2, 98.4, 97.0),
    },
}  # fmt: skip

#: speed of training by the tree, of BPTT's with a GRU that is as little fused, by N; a GPU, hidden width 2,048
SPEEDUP = {2: 0.47, 4: 0.28, 8: 0.39, 16: 0.37, 32: 0.86, 64: 1.67, 128: 2.58, 256: 3.6}

#: test figures of images in percent by blocks, backprop and the tree: accuracy, of CIFAR-100 top-5 accuracy
IMAGES = {
    "CIFAR-10": {1: (77.99, 78.58), 2: (84.53, 86.19), 3: (86.86, 87.57), 7: (88.98, 87.30)},
    "CIFAR-100": {1: (82.62, 82.43), 2: (85.55, 86.20), 3: (85.95, 85.76), 7: (85.96, 86.09)},
}
#: its table 3, accuracy on CIFAR-10 by the share of missing inputs and of wrong labels
MISSING = {0.5: (82.51, 83.12), 0.8: (69.75, 74.77)}
WRONG = {0.2: (79.55, 80.17), 0.4: (71.85, 72.70)}
