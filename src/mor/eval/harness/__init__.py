"""Few-shot tasks through the field's standard harness, lm-eval (the extra `eval`).

`mor eval DIR --tasks NAMES`, or lm-eval's own command line with `--model mor`. In lm-eval after
0.4.13 an installed package makes its models known by an entry point, so `lm_eval --model mor` finds
this one; with 0.4.13 and older, `python -m mor.eval.harness` is the same command with the model
known.
"""
