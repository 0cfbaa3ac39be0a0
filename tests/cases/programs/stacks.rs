//! Several programs in one container, and servers that start processes of their own: what a web site runs on.

use transship_testbed::DebianImage;

use super::interpreters::{ASK_HTTP, COUNT};
use super::{Expected, Program};

const IMAGE: DebianImage = DebianImage {
    name: "stacks",
    packages: &[
        "gunicorn",
        "haproxy",
        "ldap-utils",
        "nginx-light",
        "php-fpm",
        "puma",
        "python3",
        "slapd",
        "supervisor",
    ],
    hooks: &[],
    left_out: &[],
};

/// nginx and PHP's processes, which talk over a unix socket, under a supervisor, which makes its own under another name
/// first. PHP counts under a lock.
macro_rules! supervisor {
    ($php:literal) => {
        concat!(
            r#"cat >/srv/count.php <<'END'
<?php
$f = fopen('/srv/n', 'c+');
flock($f, LOCK_EX);
$n = (int)stream_get_contents($f) + 1;
rewind($f);
fwrite($f, "$n\n");
fclose($f);
echo "$n\n";
END
cat >/etc/nginx/nginx.conf <<'END'
user root;
worker_processes 2;
events {}
http {
    server {
        listen 7000;
        location / {
            include fastcgi_params;
            fastcgi_param SCRIPT_FILENAME /srv/count.php;
            fastcgi_pass unix:/run/php.sock;
        }
    }
}
END
cat >/srv/php.conf <<'END'
[global]
error_log = /dev/null
[www]
user = root
group = root
listen = /run/php.sock
pm = dynamic
pm.max_children = 4
pm.start_servers = 2
pm.min_spare_servers = 1
pm.max_spare_servers = 3
END
cat >/srv/supervisor.conf <<'END'
[supervisord]
nodaemon = true
user = root
logfile = /srv/supervisor.log
[unix_http_server]
file = /run/supervisor.sock
[supervisorctl]
serverurl = unix:///run/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:nginx]
command = nginx -g 'daemon off;'
startsecs = 0
[program:php]
startsecs = 0
command = fpm -F -R -y /srv/php.conf "#,
            $php,
            r#"
END
ln -s /usr/sbin/php-fpm* /usr/local/bin/fpm
exec supervisord -c /srv/supervisor.conf"#
        )
    };
}

/// PHP since 8.3 has the memory for the code that it makes before its own, shared, and CRIU would put its code there.
pub(super) const PHP_JIT: Program = Program {
    name: "php_jit",
    package: "php8.4-fpm",
    start: supervisor!(""),
    alone: PHP_REFUSED,
    in_a_sandbox: PHP_REFUSED,
    in_a_pod: PHP_REFUSED,
    ..SUPERVISOR
};

const PHP_REFUSED: Expected = Expected::Refused("opcache.jit_buffer_size=0");

pub(super) const SUPERVISOR: Program = Program {
    name: "supervisor",
    image: &IMAGE,
    package: "supervisor",
    start: supervisor!("-d opcache.jit_buffer_size=0"),
    operation: ASK_HTTP,
    count: "test $(supervisorctl -c /srv/supervisor.conf status | grep -c RUNNING) = 2 && cat /srv/n",
    ..Program::PLAIN
};

/// A master and its worker; what it has counted is asked over its socket.
pub(super) const HAPROXY: Program = Program {
    name: "haproxy",
    image: &IMAGE,
    package: "haproxy",
    start: r#"cat >/srv/haproxy.conf <<'END'
global
    master-worker
    nbthread 2
    stats socket /run/haproxy.sock mode 600 level admin expose-fd listeners
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
frontend web
    bind :7000
    http-request return status 200 content-type text/plain string ok
END
exec haproxy -f /srv/haproxy.conf"#,
    operation: ASK_HTTP,
    count: r#"python3 -c '
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/haproxy.sock")
s.send(b"show stat\n")
text = b""
while more := s.recv(65536):
    text += more
head, web = [line.split(",") for line in text.decode().lstrip(chr(35)).lstrip().splitlines()[:2]]
print(web[head.index("req_tot")])'"#,
    ..Program::PLAIN
};

/// Processes that are forked in advance, each of which has a database of SQLite open, which they share memory of.
pub(super) const GUNICORN: Program = Program {
    name: "gunicorn_sqlite",
    image: &IMAGE,
    package: "gunicorn",
    start: r#"cat >/srv/app.py <<'END'
import sqlite3
db = None
def app(environ, start_response):
    global db
    if not db:
        db = sqlite3.connect("/srv/db", timeout=10, isolation_level=None)
        db.execute("pragma journal_mode=wal")
        db.execute("create table if not exists t (n integer primary key)")
    db.execute("insert into t values (null)")
    start_response("200 OK", [("Content-Length", "3")])
    return [b"ok\n"]
END
cd /srv && exec gunicorn -w 2 -b 0.0.0.0:7000 app:app"#,
    operation: ASK_HTTP,
    count: r#"python3 -c 'import sqlite3; print(sqlite3.connect("/srv/db").execute("select count(*) from t").fetchone()[0])'"#,
    alone: Expected::With(&["--file-locks"]),
    in_a_sandbox: Expected::With(&["--file-locks"]),
    in_a_pod: Expected::With(&["--file-locks"]),
    ..Program::PLAIN
};

/// Ruby, in two processes with threads.
pub(super) const PUMA: Program = Program {
    name: "puma",
    image: &IMAGE,
    package: "puma",
    start: r##"cat >/srv/config.ru <<'END'
run lambda { |env|
  n = File.open("/srv/n", File::RDWR | File::CREAT) do |f|
    f.flock(File::LOCK_EX)
    n = f.read.to_i + 1
    f.rewind
    f.write("#{n}\n")
    n
  end
  [200, { "content-type" => "text/plain" }, ["#{n}\n"]]
}
END
cd /srv && exec puma -w 2 -t 1:2 -b tcp://0.0.0.0:7000 config.ru"##,
    operation: ASK_HTTP,
    count: COUNT,
    ..Program::PLAIN
};

/// A database that all of its threads have mapped.
pub(super) const SLAPD: Program = Program {
    name: "slapd",
    image: &IMAGE,
    package: "slapd",
    start: r#"mkdir /srv/ldap
cat >/srv/slapd.conf <<'END'
include /etc/ldap/schema/core.schema
modulepath /usr/lib/ldap
moduleload back_mdb
database mdb
suffix dc=x
rootdn cn=admin,dc=x
rootpw secret
directory /srv/ldap
maxsize 67108864
END
printf 'dn: dc=x\nobjectClass: dcObject\nobjectClass: organization\no: x\ndc: x\n' | slapadd -f /srv/slapd.conf
exec slapd -d 0 -f /srv/slapd.conf -h ldap://0.0.0.0:389"#,
    operation: r#"printf 'dn: cn=%s,dc=x\nobjectClass: device\n' $(cat /proc/sys/kernel/random/uuid) | ldapadd -x -H ldap://$A -D cn=admin,dc=x -w secret"#,
    count: "ldapsearch -x -LLL -H ldap://$A -b dc=x '(objectClass=device)' dn | grep -c ^dn:",
    ..Program::PLAIN
};
