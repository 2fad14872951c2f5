"""The commands, one file each: `qexp NAME`, or `python -m qexp.entrypoints.NAME` (in the repository
`python -m entrypoints.NAME`, as MLproject does).

`python -m` puts the current folder before all others, where a file of the user's may be called `random.py`. Once this
package and the library have been found, nothing is imported from there.
"""

import os
import sys

import qexp as qexp

# While Python looks for the module of `-m`, this is the first of the words.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]
