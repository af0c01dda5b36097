"""Metrics: rates with intervals, AUROC, stealth and agreement, from predictions, scores or images."""
