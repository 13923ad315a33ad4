//! Packs what `src/docs.rs` serves, each file gzipped, into OUT_DIR: the contract
//! as YAML and as JSON, the page, and from Swagger UI's release only what it uses.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::Path;

use flate2::{Compression, GzBuilder};
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::ZipArchive;

const SWAGGER_UI: [&str; 4] =
    ["dist/swagger-ui-bundle.js", "dist/swagger-ui.css", "dist/index.css", "LICENSE"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=api/openapi.yaml");
    println!("cargo::rerun-if-changed=api/docs");

    let yaml = fs::read_to_string("api/openapi.yaml")?;
    let contract: serde_json::Value = serde_saphyr::from_str(&yaml)?;
    pack("openapi.yaml", yaml.as_bytes())?;
    pack("openapi.json", &serde_json::to_vec(&contract)?)?;

    pack("index.html", &fs::read("api/docs/index.html")?)?;
    pack("start.js", &fs::read("api/docs/start.js")?)?;

    // Everything in the archive lies in one folder named after the release.
    let mut archive = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    let folder = archive.name_for_index(0).ok_or("an empty archive")??.into_owned();
    for path in SWAGGER_UI {
        let mut bytes = Vec::new();
        archive.by_name(&format!("{folder}{path}"))?.read_to_end(&mut bytes)?;
        let (_, name) = path.rsplit_once('/').unwrap_or(("", path));
        pack(name, &bytes)?;
    }
    Ok(())
}

/// No time and no name goes into the gzip header: the same input, the same binary.
fn pack(name: &str, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let out = Path::new(&std::env::var("OUT_DIR")?).join(format!("{name}.gz"));
    let mut packed = GzBuilder::new().read(bytes, Compression::best());
    std::io::copy(&mut packed, &mut File::create(out)?)?;
    Ok(())
}
