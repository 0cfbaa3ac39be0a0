//! Programs on the runtimes of languages, and a shell in a terminal. Those that listen do it on port 7000,
//! and write to /srv/n how many they have answered.

use transship_testbed::{DebianImage, PodSecurity, Workload};

use super::{Expected, Program};

/// The server says its count at once.
const ASK: &str = r"exec 3<>/dev/tcp/$A/7000; read -r -t 5 answer <&3; [[ $answer == [0-9]* ]]";
pub(super) const ASK_HTTP: &str = r"exec 3<>/dev/tcp/$A/7000; printf 'GET / HTTP/1.0\r\n\r\n' >&3; read -r -t 5 answer <&3; [[ $answer == *' 200 '* ]]";
pub(super) const COUNT: &str = "cat /srv/n";

/// A server that writes its count to a file.
macro_rules! asyncio {
    ($file:literal) => {
        concat!(
            "exec python3 -c '
import asyncio
n = 0
async def serve(reader, writer):
    global n
    n += 1
    open(\"",
            $file,
            "\", \"w\").write(f\"{n}\\n\")
    writer.write(f\"{n}\\n\".encode())
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, \"0.0.0.0\", 7000)
    await server.serve_forever()
asyncio.run(main())'"
        )
    };
}

/// Processes that share memory and a lock, started in one of Python's ways.
macro_rules! multiprocessing {
    ($way:literal) => {
        concat!(
            "cat >/srv/server.py <<'END'
import multiprocessing as m, socket
def work(listener, n, lock):
    while True:
        connection, _ = listener.accept()
        with lock:
            n.value += 1
            open('/srv/n', 'w').write(f'{n.value}\\n')
            connection.sendall(f'{n.value}\\n'.encode())
        connection.close()
if __name__ == '__main__':
    m.set_start_method('",
            $way,
            "')
    listener = socket.create_server(('0.0.0.0', 7000))
    shared = (listener, m.Value('Q', 0, lock=False), m.Lock())
    workers = [m.Process(target=work, args=shared) for _ in range(3)]
    [w.start() for w in workers]
    [w.join() for w in workers]
END
exec python3 /srv/server.py"
        )
    };
}

/// A server that answers when it has seen its own change of a file in a directory.
macro_rules! node_watch {
    ($dir:literal) => {
        concat!(
            "exec node -e '
const fs = require(\"fs\"), dir = \"",
            $dir,
            "\";
fs.mkdirSync(dir, { recursive: true });
let n = 0, waiting = [];
fs.watch(dir, () => {
    for (const response of waiting.splice(0)) {
        fs.writeFileSync(\"/srv/n\", `${++n}\\n`);
        response.end(`${n}\\n`);
    }
});
require(\"http\").createServer((request, response) => {
    waiting.push(response);
    fs.writeFileSync(`${dir}/file`, `${n}`);
}).listen(7000, \"0.0.0.0\");'"
        )
    };
}

pub(super) const PYTHON_ASYNCIO: Program = Program {
    name: "python_asyncio",
    package: "python3",
    start: asyncio!("/srv/n"),
    operation: ASK,
    count: COUNT,
    ..Program::PLAIN
};

/// The same as a user that may do nothing, with a group for its files (fsGroup).
pub(super) const PYTHON_OF_UID_1000: Program = Program {
    name: "python_of_uid_1000",
    run: &["--user", "1000:2000", "--seccomp"],
    security: PodSecurity {
        user: Some(1000),
        group: Some(2000),
        dropped: &["ALL"],
        no_new_privileges: true,
        ..Program::PLAIN.security
    },
    start: asyncio!("/tmp/n"),
    count: "cat /tmp/n",
    ..PYTHON_ASYNCIO
};

/// Processes that share memory and a lock; each accepts.
pub(super) const PYTHON_FORK: Program = Program {
    name: "python_fork",
    start: multiprocessing!("fork"),
    ..PYTHON_ASYNCIO
};

/// The same with processes that are executed anew: the lock is a named semaphore.
pub(super) const PYTHON_SPAWN: Program = Program {
    name: "python_spawn",
    start: multiprocessing!("spawn"),
    alone: Expected::With(&["--link-remap"]),
    in_a_sandbox: Expected::With(&["--link-remap"]),
    in_a_pod: Expected::With(&["--link-remap"]),
    ..PYTHON_ASYNCIO
};

const NODE: DebianImage = DebianImage {
    name: "node",
    packages: &["nodejs", "tmux"],
    hooks: &[],
    left_out: &[],
};

/// Without a seccomp profile it uses io_uring, which CRIU does not know.
pub(super) const NODE_HTTP: Program = Program {
    name: "node_http",
    image: &NODE,
    package: "nodejs",
    start: r#"exec node -e '
let n = 0;
require("http").createServer((request, response) => {
    require("fs").writeFileSync("/srv/n", `${++n}\n`);
    response.end(`${n}\n`);
}).listen(7000, "0.0.0.0");'"#,
    operation: ASK_HTTP,
    count: COUNT,
    run: &["--seccomp"],
    ..Program::PLAIN
};

/// It answers when it has seen its own change of a file in a directory that it has made.
pub(super) const NODE_WATCH: Program = Program {
    name: "node_watch",
    start: node_watch!("/srv/watched"),
    ..NODE_HTTP
};

/// The same in a directory of the image, which CRIU looks for where it is told (`irmap-scan-path`).
pub(super) const NODE_WATCH_IMAGE: Program = Program {
    name: "node_watch_image",
    start: node_watch!("/opt"),
    ..NODE_HTTP
};

/// A server of Java's own, in threads of its own.
macro_rules! jvm {
    ($options:literal) => {
        concat!(
            r#"cat >/srv/Server.java <<'END'
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.file.*;
import java.util.concurrent.Executors;
public class Server {
    static long n = 0;
    public static void main(String[] arguments) throws Exception {
        var server = HttpServer.create(new InetSocketAddress("0.0.0.0", 7000), 0);
        server.setExecutor(Executors.newVirtualThreadPerTaskExecutor());
        server.createContext("/", exchange -> {
            byte[] answer;
            synchronized (Server.class) {
                answer = (++n + "\n").getBytes();
                Files.write(Path.of("/srv/n"), answer);
            }
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}
END
exec java "#,
            $options,
            " /srv/Server.java"
        )
    };
}

pub(super) const JVM: Program = Program {
    name: "jvm",
    image: &DebianImage {
        name: "jvm",
        packages: &["openjdk-21-jdk-headless"],
        hooks: &[],
        left_out: &["./usr/lib/jvm/*/lib/src.zip", "./usr/lib/jvm/*/jmods"],
    },
    package: "openjdk-21-jdk-headless",
    start: jvm!("-Xmx64m"),
    operation: ASK_HTTP,
    count: COUNT,
    ..Program::PLAIN
};

/// Its heap is a memfd.
pub(super) const JVM_ZGC: Program = Program {
    name: "jvm_zgc",
    start: jvm!("-XX:+UseZGC -Xmx128m"),
    ..JVM
};

pub(super) const GO: Program = Program {
    name: "go",
    image: &DebianImage {
        name: "go",
        packages: &["golang-go"],
        hooks: &[GO_BUILD],
        left_out: &["./usr/lib/go*", "./usr/share/go*", "./root/.cache"],
    },
    package: "golang-go",
    start: "exec server",
    operation: ASK_HTTP,
    count: COUNT,
    ..Program::PLAIN
};

/// What `net.Listen` does since Go 1.24.
pub(super) const GO_MPTCP: Program = Program {
    name: "go_mptcp",
    start: "exec server mptcp",
    alone: Expected::Refused("Multipath TCP"),
    in_a_sandbox: Expected::Refused("Multipath TCP"),
    in_a_pod: Expected::Refused("Multipath TCP"),
    ..GO
};

const GO_BUILD: &str = r#"--customize-hook=mkdir "$1"/src && cat >"$1"/src/server.go <<'END'
package main

import (
    "context"
    "fmt"
    "net"
    "net/http"
    "os"
    "sync"
)

func main() {
    var config net.ListenConfig
    config.SetMultipathTCP(len(os.Args) > 1)
    listener, err := config.Listen(context.Background(), "tcp", "0.0.0.0:7000")
    if err != nil {
        panic(err)
    }
    var lock sync.Mutex
    n := 0
    panic(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
        lock.Lock()
        defer lock.Unlock()
        n++
        if err := os.WriteFile("/srv/n", []byte(fmt.Sprintln(n)), 0o644); err != nil {
            panic(err)
        }
        fmt.Fprintln(w, n)
    })))
}
END
chroot "$1" env HOME=/root CGO_ENABLED=0 GO111MODULE=off go build -o /usr/local/bin/server /src/server.go"#;

pub(super) const TOKIO: Program = Program {
    name: "tokio",
    ours: Some(Workload::Tokio),
    // Our own; the table shows what it runs on.
    package: "libc6",
    start: "exec /usr/local/bin/tokio",
    operation: ASK,
    count: COUNT,
    ..Program::PLAIN
};

/// A variable of a shell in a terminal of tmux.
pub(super) const TMUX: Program = Program {
    name: "tmux",
    image: &NODE,
    package: "tmux",
    start: "echo 0 >/srv/n; tmux new-session -d -s s -x 80 -y 24 'bash --norc'; exec sleep infinity",
    operation: r#"before=$(cat /srv/n)
tmux send-keys -t s 'n=$((n+1)); echo $n >/srv/n' Enter
for look in {1..200}; do now=$(cat /srv/n); [[ $now && $now -gt $before ]] && exit; sleep 0.05; done; exit 1"#,
    count: COUNT,
    inside: true,
    ..Program::PLAIN
};
