"""`ray start --address=127.0.0.1:...` for a head on loopback; takes the arguments of `ray`.

The command line of Ray on Linux either replaces 127.0.0.1 by the machine's other address, where a head on loopback does
not answer, or (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which what it starts inherits) refuses to join any head. This
process joins and takes the address as it is.
"""

from __future__ import annotations

from ray._private import ray_constants, services
from ray.scripts.scripts import main

if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    main()
