"""The load-test program: TTFT, capacity and the SLO's verdict for one engine replica.

`profile`, `result`, `verdict`, `picture` and `report` import neither locust nor gevent (which
patch sockets and threads), so that Dagster assets may import them. The rest runs in the Job.
"""
