"""Whether a machine can do what Pilot asks of it: small checks over small probes, each with its cure.

`quick_checks()` is for those who start something; `pilot doctor` runs all. May import `status`, `launch` and
what lies below; torch and nanochat only in a child process (`child.py`).
"""

from pilot.doctor.examine import examine, quick_checks
from pilot.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine", "quick_checks"]
