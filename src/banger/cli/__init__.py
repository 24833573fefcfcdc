"""The command line: one module per noun."""

import gc

# imports make objects that stay, which the collector would look through a dozen times: a tenth of the time of a start
gc.set_threshold(20_000, 10, 10)
