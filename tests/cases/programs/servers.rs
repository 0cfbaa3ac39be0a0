//! Databases, caches, web servers and brokers.

use transship_testbed::DebianImage;

use super::{Expected, Program};

/// They hold connections to themselves.
const CLOSE: Expected = Expected::With(&["--tcp", "close"]);

pub(super) const REDIS: Program = Program {
    name: "redis",
    package: "redis-server",
    start: "exec redis-server --bind '*' --protected-mode no --appendonly yes --dir /srv",
    operation: r"exec 3<>/dev/tcp/$A/6379; printf 'INCR n\r\n' >&3; read -r -t 5 answer <&3; [[ $answer == :* ]]",
    count: "redis-cli -h $A get n",
    ..Program::PLAIN
};

/// As root, which it may not leave: CRIU dumps no other user without CAP_SYS_RESOURCE.
pub(super) const NGINX: Program = Program {
    name: "nginx",
    package: "nginx-light",
    start: "sed -i 's/^user .*/user root;/; s/^worker_processes .*/worker_processes 2;/' /etc/nginx/nginx.conf; exec nginx -g 'daemon off;'",
    operation: r"exec 3<>/dev/tcp/$A/80; printf 'GET / HTTP/1.0\r\n\r\n' >&3; read -r -t 5 answer <&3; [[ $answer == *' 200 '* ]]",
    count: "wc -l </var/log/nginx/access.log",
    ..Program::PLAIN
};

pub(super) const MEMCACHED: Program = Program {
    name: "memcached",
    package: "memcached",
    start: "exec memcached -u root -l 0.0.0.0",
    operation: r"exec 3<>/dev/tcp/$A/11211; printf 'add n 0 0 1\r\n0\r\nincr n 1\r\n' >&3; read -r -t 5 answer <&3; read -r -t 5 answer <&3; [[ $answer == [0-9]* ]]",
    count: r"exec 3<>/dev/tcp/$A/11211; printf 'get n\r\n' >&3; read -r -t 5 head <&3; read -r -t 5 n <&3; echo ${n%$'\r'}",
    ..Program::PLAIN
};

/// Without a seccomp profile it uses io_uring, which CRIU does not know.
pub(super) const MARIADB: Program = Program {
    name: "mariadb",
    image: &DebianImage {
        name: "mariadb",
        packages: &["mariadb-client", "mariadb-server"],
        hooks: &[],
        left_out: &[],
    },
    package: "mariadb-server",
    start: "mariadb-install-db --user=root --datadir=/srv/db --skip-test-db >/dev/null
echo 'create database if not exists d;
create table if not exists d.t (n int auto_increment primary key);' >/srv/init.sql
exec mariadbd --user=root --datadir=/srv/db --bind-address=0.0.0.0 --skip-grant-tables --init-file=/srv/init.sql \
  --socket=/srv/socket --pid-file=/srv/pid --innodb-buffer-pool-size=32M --innodb-log-file-size=16M",
    operation: "mariadb --skip-ssl -h $A -e 'insert into d.t values ()'",
    count: "mariadb --skip-ssl -h $A -N -e 'select count(*) from d.t'",
    run: &["--seccomp"],
    ..Program::PLAIN
};

pub(super) const ETCD: Program = Program {
    name: "etcd",
    image: &DebianImage::ETCD,
    package: "etcd-server",
    start: "exec etcd --data-dir /srv/data --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://127.0.0.1:2379",
    operation: "etcdctl --endpoints http://$A:2379 put n 1",
    count: "etcdctl --endpoints http://$A:2379 get n -w fields | sed -n 's/^\"Version\" : //p'",
    alone: CLOSE,
    ..Program::PLAIN
};

/// It counts its own answers.
pub(super) const PROMETHEUS: Program = Program {
    name: "prometheus",
    image: &DebianImage {
        name: "prometheus",
        packages: &["prometheus"],
        hooks: &[],
        left_out: &[],
    },
    package: "prometheus",
    start: "exec prometheus --config.file=/etc/prometheus/prometheus.yml --storage.tsdb.path=/srv/data --web.listen-address=0.0.0.0:9090",
    operation: r"exec 3<>/dev/tcp/$A/9090; printf 'GET /-/ready HTTP/1.0\r\n\r\n' >&3; read -r -t 5 answer <&3; [[ $answer == *' 200 '* ]]",
    count: r#"exec 3<>/dev/tcp/$A/9090; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; sed -n 's,^prometheus_http_requests_total{code="200"\,handler="/-/ready"} ,,p' <&3"#,
    alone: CLOSE,
    ..Program::PLAIN
};

/// The answer to a message is its receipt, which STOMP asks for. Who is asked for the count is found through epmd, to which
/// the server connects anew a few seconds after its connection has been closed.
pub(super) const RABBITMQ: Program = Program {
    name: "rabbitmq",
    image: &DebianImage {
        name: "rabbitmq",
        packages: &["rabbitmq-server"],
        hooks: &[],
        left_out: &[],
    },
    package: "rabbitmq-server",
    start: "export HOME=/var/lib/rabbitmq RABBITMQ_NODENAME=rabbit@localhost
echo '[rabbitmq_stomp].' >/etc/rabbitmq/enabled_plugins
echo 'loopback_users.guest = false' >/etc/rabbitmq/rabbitmq.conf
exec /usr/lib/rabbitmq/bin/rabbitmq-server",
    operation: r"exec 3<>/dev/tcp/$A/61613
printf 'CONNECT\naccept-version:1.2\nlogin:guest\npasscode:guest\n\n\0SEND\ndestination:/queue/n\nreceipt:1\npersistent:true\n\nx\0' >&3
while read -r -t 10 answer <&3; do [[ $answer == *RECEIPT ]] && exit; done; exit 1",
    count: "export HOME=/var/lib/rabbitmq
for try in 1 2 3 4 5; do rabbitmqctl -n rabbit@localhost -q list_queues --no-table-headers messages && exit; sleep 2; done; exit 1",
    alone: CLOSE,
    ..Program::PLAIN
};

/// As the user postgres: it does not run as root. On the cluster that Debian's package has made. Its `psql` in the path is a
/// program in Perl, which the image has not.
pub(super) const POSTGRESQL: Program = Program {
    name: "postgresql",
    image: &DebianImage::POSTGRESQL,
    package: "postgresql",
    start: r#"exec setpriv --reuid=postgres --regid=postgres --init-groups bash -c '
cd /usr/lib/postgresql/*/bin
echo "host all all 0.0.0.0/0 trust" >/tmp/hba
set -- -D /var/lib/postgresql/*/main -c config_file=$(echo /etc/postgresql/*/main/postgresql.conf) -c ssl=off -c jit=off
echo "create table t (n serial)" | ./postgres --single "$@" postgres >/dev/null
exec ./postgres "$@" -c hba_file=/tmp/hba -c listen_addresses=* -c unix_socket_directories=/tmp'"#,
    operation: "/usr/lib/postgresql/*/bin/psql -h $A -U postgres -c 'insert into t default values'",
    count: "/usr/lib/postgresql/*/bin/psql -h $A -U postgres -At -c 'select count(*) from t'",
    ..Program::PLAIN
};
