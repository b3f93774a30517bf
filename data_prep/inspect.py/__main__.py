"""The former name of inspect_store.py, refused: a file called inspect.py stood before the standard library's."""

import sys

print("error: data_prep/inspect.py is called data_prep/inspect_store.py now; run that, same arguments", file=sys.stderr)
sys.exit(2)
