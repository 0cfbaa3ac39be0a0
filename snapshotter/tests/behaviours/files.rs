//! Behaviours of the files in snapshots.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use containerd_client::services::v1::snapshots::Kind;

use crate::bench::{LABELS, behaviour, names, refused, write};
use crate::support::mounted::Mounted;

#[test]
fn root_files_change_from_layer_to_layer() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "foo", "first");
                write(dir, "bar", "first");
            })
            .await;
        bench
            .layer("two", "one", |dir| write(dir, "foo", "second"))
            .await;
        bench
            .layer("three", "two", |dir| {
                write(dir, "bar", "third");
                write(dir, "new/file", "third");
            })
            .await;
        let shown = bench.content("three").await;
        assert!(shown[Path::new("foo")].ends_with(" second"), "{shown:?}");
        assert!(shown[Path::new("bar")].ends_with(" third"), "{shown:?}");
        assert!(bench.content("one").await[Path::new("foo")].ends_with(" first"));
    });
}

#[test]
fn root_a_directory_of_a_lower_layer_is_removed_and_made_again() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/old", "");
                write(dir, "dir/sub/old", "");
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::remove_dir_all(dir.join("dir")).unwrap();
            })
            .await;
        bench
            .layer("three", "two", |dir| write(dir, "dir/new", ""))
            .await;
        assert_eq!(names(&bench.content("two").await), [] as [&str; 0]);
        assert_eq!(names(&bench.content("three").await), ["dir", "dir/new"]);
        assert_eq!(
            names(&bench.content("one").await),
            ["dir", "dir/old", "dir/sub", "dir/sub/old"]
        );
    });
}

#[test]
fn root_ownership_survives_layers() {
    behaviour(async |bench| {
        let chown = |path: PathBuf, id| std::os::unix::fs::chown(path, Some(id), Some(id)).unwrap();
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/file", "");
                write(dir, "other", "");
                chown(dir.join("dir"), 1);
                chown(dir.join("dir/file"), 1);
                chown(dir.to_path_buf(), 7);
            })
            .await;
        bench
            .layer("two", "one", |dir| chown(dir.join("dir/file"), 2))
            .await;
        let shown = bench.content("two").await;
        assert!(shown[Path::new("dir")].contains(" 1:1 "), "{shown:?}");
        assert!(shown[Path::new("dir/file")].contains(" 2:2 "), "{shown:?}");
        assert!(shown[Path::new("other")].contains(" 0:0 "), "{shown:?}");
        // The top directory of a new snapshot belongs to whom its parent's belongs.
        let mounted = bench.prepare("three", "two").await;
        let top = fs::metadata(mounted.path()).unwrap();
        assert_eq!((top.uid(), top.gid()), (7, 7));
    });
}

#[test]
fn root_modes_survive_commit() {
    behaviour(async |bench| {
        let chmod = |path: PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        bench
            .layer("one", "", |dir| {
                for (name, mode) in [
                    ("d1", 0o700),
                    ("d2", 0o1777),
                    ("d3", 0o2755),
                    ("d3/sub", 0o711),
                ] {
                    fs::create_dir(dir.join(name)).unwrap();
                    chmod(dir.join(name), mode);
                }
            })
            .await;
        bench
            .layer("two", "one", |dir| chmod(dir.join("d1"), 0o755))
            .await;
        let shown = bench.content("two").await;
        let modes: Vec<_> = shown
            .values()
            .map(|what| what.split(' ').next().unwrap())
            .collect();
        assert_eq!(modes, ["40755", "41777", "42755", "40711"]);
        assert!(bench.content("one").await[Path::new("d1")].starts_with("40700"));
    });
}

#[test]
fn root_deleted_files_stay_deleted_above() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "kept", "");
                write(dir, "deleted", "");
                write(dir, "dir/deleted", "");
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::remove_file(dir.join("deleted")).unwrap();
                fs::remove_file(dir.join("dir/deleted")).unwrap();
            })
            .await;
        bench
            .layer("three", "two", |dir| write(dir, "added", ""))
            .await;
        assert_eq!(
            names(&bench.content("three").await),
            ["added", "dir", "kept"]
        );
    });
}

#[test]
fn root_a_file_of_a_lower_layer_moves() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "dir/file", "content");
                fs::set_permissions(dir.join("dir/file"), fs::Permissions::from_mode(0o4711))
                    .unwrap();
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                fs::rename(dir.join("dir/file"), dir.join("moved")).unwrap();
            })
            .await;
        let shown = bench.content("two").await;
        assert_eq!(names(&shown), ["dir", "moved"]);
        assert_eq!(shown[Path::new("moved")], "104711 0:0 content");
    });
}

#[test]
fn root_a_view_cannot_be_written() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| write(dir, "foo", "content"))
            .await;
        bench.layer("two", "one", |dir| write(dir, "bar", "")).await;
        for (key, parent) in [("nothing", ""), ("bind", "one"), ("overlay", "two")] {
            let view = bench.view(key, parent).await;
            let error = fs::write(view.join("foo"), "changed").unwrap_err();
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ReadOnlyFilesystem,
                "{key}"
            );
            assert_eq!(bench.stat(key).await.kind(), Kind::View);
        }
        refused!(
            bench
                .client
                .commit(&bench.key("x"), &bench.key("overlay"), LABELS),
            FailedPrecondition
        );
        assert!(bench.content("one").await[Path::new("foo")].ends_with(" content"));
    });
}

#[test]
fn root_the_top_directory_has_mode_0755() {
    behaviour(async |bench| {
        let mode = |mounted: &Mounted| fs::metadata(mounted.path()).unwrap().mode() & 0o7777;
        assert_eq!(mode(&bench.prepare("one", "").await), 0o755);
        bench.commit("base", "one").await;
        assert_eq!(mode(&bench.prepare("two", "base").await), 0o755);
        assert_eq!(mode(&bench.view("view", "base").await), 0o755);
        bench.commit("top", "two").await;
        assert_eq!(mode(&bench.view("views", "top").await), 0o755);
        assert_eq!(mode(&bench.view("empty", "").await), 0o755);
    });
}

#[test]
fn root_renames_within_a_layer() {
    behaviour(async |bench| {
        bench
            .layer("one", "", |dir| {
                write(dir, "file", "one");
                std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
            })
            .await;
        bench
            .layer("two", "one", |dir| {
                // A directory of this layer; one of a lower layer cannot be renamed without redirect_dir.
                write(dir, "made/here", "two");
                fs::rename(dir.join("made"), dir.join("named")).unwrap();
                fs::rename(dir.join("file"), dir.join("file2")).unwrap();
                fs::rename(dir.join("link"), dir.join("link2")).unwrap();
                write(dir, "file", "again");
            })
            .await;
        let shown = bench.content("two").await;
        assert_eq!(
            names(&shown),
            ["file", "file2", "link2", "named", "named/here"]
        );
        assert!(shown[Path::new("file")].ends_with(" again"));
        assert!(shown[Path::new("file2")].ends_with(" one"));
    });
}

#[test]
fn root_128_layers_mount() {
    behaviour(async |bench| {
        let mut parent = String::new();
        for n in 1..=128 {
            let name = format!("layer{n}");
            bench
                .layer(&name, &parent, |dir| {
                    write(dir, &format!("file{n}"), "");
                    write(dir, "last", &n.to_string());
                })
                .await;
            parent = name;
        }
        let shown = bench.content("layer128").await;
        assert_eq!(shown.len(), 129);
        assert!(shown[Path::new("last")].ends_with(" 128"));
    });
}
