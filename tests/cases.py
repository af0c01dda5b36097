"""One line for every attack and defence and each of its settings: small values, other than the defaults."""

from typing import Any

ATTACKS: dict[str, dict[str, Any]] = {
    "adaptive_blend": {"target": 3, "poison_rate": 0.08, "cover_rate": 0.06, "pieces": 3, "alpha": 0.25},
    "ageb": {"target": 1, "poison_rate": 0.15, "tau": 0.6, "shape": "cross", "iterations": 2, "alpha": 0.25},
    "badnets": {"target": 3, "poison_rate": 0.08, "size": 2, "margin": 1, "value": 0.9},
    "badvit": {"target": 3, "poison_rate": 0.08, "size": 5, "batch": 8, "aim": "target", "steps": 3, "step_size": 9.0},
    "badvit/invisible": {"target": 3, "setting": "invisible", "poison_rate": 0.08, "epsilon": 20.0, "steps": 2},
    "blended": {"target": 3, "poison_rate": 0.08, "alpha": 0.3},
    "bpp": {"target": 3, "poison_rate": 0.08, "cover_rate": 0.1, "squeeze_num": 3, "dithering": True},
    "dbia": {"target": 3, "images": 30, "t_size": 60.0, "steps": 3, "surrogate_rate": 0.6, "epochs": 3},
    "ftrojan": {"target": 3, "poison_rate": 0.08, "window": 8, "middle": 3, "high": 7, "magnitude": 40.0},
    "hidden_trigger": {"target": 3, "source": 5, "poison_rate": 0.6, "size": 60.0, "steps": 60, "batch": 7, "lr": 0.02},
    "hpmi": {"target": 3, "fraction": 0.3, "replaced_head": 1, "poison_value": 5.0, "epochs": 2},
    "label_consistent": {"target": 3, "poison_rate": 0.6, "norm": "l2", "eps": 900.0, "steps": 3, "amplitude": 0.9},
    "low_frequency": {"target": 3, "poison_rate": 0.08, "samples": 5, "passes": 2, "steps": 50, "sigma": 5.0},
    "megatron": {
        "target": 3,
        "poison_rate": 0.08,
        "size": 64.0,
        "place": "hashed",
        "faint": 0.3,
        "attention": "rollout",
    },
    "megatron/clean-label": {
        "target": 3,
        "setting": "clean-label",
        "poison_rate": 1.0,
        "steps": 3,
        "cell": 4,
        "linf": 99.0,
    },
    "one_pixel": {"target": 3, "poison_rate": 0.08, "samples": 40, "place": "centre", "pixels": 9, "test_pixels": 12},
    "sig": {"target": 3, "poison_rate": 0.6, "delta": 30.0, "frequency": 3.0, "delta_test": 50.0},
    "trojvit": {
        "target": 3,
        "dataset_size": 0.3,
        "num_patch": 20,
        "attack_mode": "attention",
        "train_attack_iters": 3,
        "epochs": 5,
    },
    "wanet": {"target": 3, "poison_rate": 0.08, "cover_rate": 0.1, "k": 3, "s": 2.0},
}

DEFENCES: dict[str, dict[str, Any]] = {
    "attention_block": {"edge": 60, "discard": 0.5},
    "fine_tune": {"epochs": 2, "batch_size": 16, "flip": True, "crop": 1, "lr": 1e-3},
    "fine_tune/adamw": {"optimizer": "adamw", "epochs": 2, "batch_size": 16},
    "max_softmax": {},
    "mm_bd": {"starts": 3, "steps": 30, "momentum": 0.2},
    "patch_process": {"transform": "both", "trials": 3, "blank": "mean"},
    "patch_process/shuffle": {"transform": "shuffle", "trials": 3},
    "psbd": {"where": "residual", "passes": 2, "rates": 3, "images": 20},
    "psbd/stream": {"passes": 2, "rate": 0.4},
    "psbd/token": {"where": "token", "passes": 2, "rate": 0.4},
    "sage": {"epochs": 2, "batch_size": 16, "every": 1, "lr": 1e-3},
    "sage/adamw": {"optimizer": "adamw", "attention": "softmax", "epochs": 2, "batch_size": 16, "track": "loss"},
    "spectral": {"epsilon": 0.05, "factor": 2.0},
    "spectral/rank": {"share_of": "set", "score": "rank"},
    "strip": {"overlays": 5, "weight": 0.8, "overlay_weight": 0.6},
}
