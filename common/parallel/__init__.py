"""More than one GPU: calibration whose windows, and distillation whose batches, are shared out among processes.

A notebook has one process; `launch` starts as many as there are cards, each running `calibrate` or `distil` as a
program, and reads what the first of them wrote.
"""
