"""Gates by score: `gate` has the ops, `rule` their rules, `sums` what losses need of a routing."""
