"""What `pilot up` and `pilot join` say of their machine before they start anything: the doctor's short form."""

import sys


def first_look() -> None:
    """Say on standard error what must be done for this machine, if anything; it is the operator who decides."""
    from pilot.doctor import Level, quick_checks

    for finding in quick_checks(url=""):  # of Redis nothing is known yet
        if finding.level is Level.FIX:
            print(f"warning: {finding.what}: {finding.text}: {finding.cure}", file=sys.stderr)
