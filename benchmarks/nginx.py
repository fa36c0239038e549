"""nginx as the yardstick: one worker, proxy_pass, keep-alive upstream, nothing buffered."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

CONFIGURATION = """\
daemon off;
{user}worker_processes {workers};
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 16m;
    keepalive_requests 100000000;
    keepalive_timeout 600s;
    tcp_nodelay on;
    upstream mock {{
        server 127.0.0.1:{upstream};
        keepalive 1024;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
    }}
}}
"""


def find_nginx() -> str | None:
    """Return the path of nginx, or None."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")


def write_nginx_command(folder: Path, program: str, port: int, upstream: int) -> list[str]:
    """Write a configuration into the folder; return the command that runs nginx with it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Started by root, nginx would run its worker as an account that cannot enter the folder.
    user = f"user {pwd.getpwuid(0).pw_name};\n" if os.geteuid() == 0 else ""
    path = folder / "nginx.conf"
    path.write_text(CONFIGURATION.format(user=user, workers=1, folder=folder, upstream=upstream, port=port))
    return [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(path)]
