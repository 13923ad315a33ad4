//! The services' programs, and the check that they are those of the sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The folder with the services' programs: `MATINEE_BIN_DIR`, or the `target/<profile>` in
/// which this test was built.
pub fn directory() -> PathBuf {
    // A test's own program is in target/<profile>/deps, the services' are one level higher.
    let of_this_test = || {
        let test = std::env::current_exe().unwrap_or_default();
        test.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default()
    };
    std::env::var_os("MATINEE_BIN_DIR").map_or_else(of_this_test, PathBuf::from)
}

/// The program of a service. Panics when it is missing, or older than a source that it is made
/// of: `cargo test` builds no other package's programs, and a test of an old one says nothing.
pub fn program(service: &str) -> PathBuf {
    let path = directory().join(service);
    if let Err(problem) = check(&path) {
        panic!("{problem}: build it first, by cargo build --workspace --bins");
    }
    path
}

/// Whether a program is there and up to date.
///
/// Cargo writes beside each program which files of this repository it is made of
/// (`gateway.d`). A program without that list, such as an installed one, counts as up to date.
pub fn check(program: &Path) -> Result<(), String> {
    let built = modified(program).ok_or_else(|| format!("{} is missing", program.display()))?;
    let Ok(list) = fs::read_to_string(program.with_extension("d")) else { return Ok(()) };
    let (_, sources) = list.split_once(": ").unwrap_or_default();
    // A blank in a path is written as "\ ".
    let sources = sources.trim_end().replace("\\ ", "\0");
    for source in sources.split(' ').map(|source| source.replace('\0', " ")) {
        match modified(Path::new(&source)) {
            Some(changed) if changed <= built => (),
            Some(_) => return Err(format!("{} is older than {source}", program.display())),
            None => {
                return Err(format!("{} is made of {source}, which is gone", program.display()));
            }
        }
    }
    Ok(())
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_program_that_is_missing_or_older_than_a_source_is_rejected() {
        let folder = std::env::temp_dir().join(format!("matinee binaries {}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (program, source) = (folder.join("service"), folder.join("main file.rs"));
        let mut found = vec![check(&program)];
        fs::write(&program, "").unwrap();
        found.push(check(&program));

        fs::write(&source, "").unwrap();
        let escaped = |path: &Path| path.display().to_string().replace(' ', "\\ ");
        let list = format!("{}: {}\n", escaped(&program), escaped(&source));
        fs::write(folder.join("service.d"), list).unwrap();
        let built = modified(&program).unwrap();
        for age in [1, -1_i64] {
            let step = Duration::from_secs(age.unsigned_abs());
            let changed = if age > 0 { built - step } else { built + step };
            File::options().write(true).open(&source).unwrap().set_modified(changed).unwrap();
            found.push(check(&program));
        }
        fs::remove_file(&source).unwrap();
        found.push(check(&program));
        fs::remove_dir_all(&folder).unwrap();

        let (program, source) = (program.display(), source.display());
        assert_eq!(
            found,
            [
                Err(format!("{program} is missing")),
                Ok(()),
                Ok(()),
                Err(format!("{program} is older than {source}")),
                Err(format!("{program} is made of {source}, which is gone")),
            ]
        );
    }
}
