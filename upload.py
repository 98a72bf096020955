"""Release a reranker on the Hub from a clone: the same as `querit release`."""

import sys

from modeling_querit.cli import main

if __name__ == "__main__":
    main(["release", *sys.argv[1:]])
