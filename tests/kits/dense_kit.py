"""Flags of fairseq's own dense model in each family, for the tests of growing and converting."""

DENSE = {
    "translation": ("--arch", "transformer", "--criterion", "label_smoothed_cross_entropy"),
    "lm": (
        *("--arch", "transformer_lm", "--criterion", "cross_entropy"),
        *("--decoder-input-dim", 32, "--decoder-output-dim", 32),
    ),
    "mlm": ("--arch", "roberta", "--criterion", "masked_lm"),
}
TASKS = {"translation": "translation", "lm": "language_modeling", "mlm": "masked_lm"}
