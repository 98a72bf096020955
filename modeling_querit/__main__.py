"""The command `querit`, and `python -m modeling_querit`."""

from .interrupts import one_line_interrupts


def main() -> None:
    """Run the command line, which takes a moment to import, as interruptible as the rest."""
    with one_line_interrupts(is_program=True):
        from .cli import main as run

        run()


if __name__ == "__main__":
    main()
