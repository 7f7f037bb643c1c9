"""`evomoe-export --format hf`: write a folder that transformers loads, and read it back."""

# first of all, so that transformers can be imported; see there
import fairseq_evomoe.hf  # noqa: F401
