//! Files of the Hugging Face hub, through the crate `hf-hub` (its small synchronous client; TLS is `rustls` with `ring`).
//!
//! `hf-hub` reads `HF_ENDPOINT`, and the token from `HF_HOME`; it resumes an interrupted file. Its own cache is a working
//! directory here: the finished file is checked and moved to its place. What the server says is not trusted: names are
//! checked before they become paths, and a file is kept only with the SHA-256 that the catalogue, or else the hub's own
//! listing, states.

use super::assembly::{install, sha256_of};
use super::resolve::safe_component;
use super::{Cache, HubFile, HubSpec, Progress, PullError};
use crate::catalogue::KnownModel;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// How often a broken connection is taken up again before giving up.
const RETRIES: usize = 3;

/// Fetches a file of the catalogue; the caller holds its lock.
pub(super) fn known(
    cache: &Cache,
    model: &KnownModel,
    repo: &str,
    file: &str,
    progress: &mut dyn Progress,
) -> Result<PathBuf, PullError> {
    let place = cache.model_path(model);
    let client = Client::new(&cache.partial().join(model.id).join("hub"))?;
    client.fetch(repo, file, Some(model.sha256), &place, progress)?;
    progress.finish();
    Ok(place)
}

/// Fetches what `spec` names, with all files of a split model, and says where the (first) file is.
pub(super) fn fetch(cache: &Cache, spec: &HubSpec, progress: &mut dyn Progress) -> Result<PathBuf, PullError> {
    if let HubFile::Path(file) = &spec.file {
        let place = cache.hub_path(&spec.repo, file);
        if place.is_file() && split_names(file).iter().all(|f| cache.hub_path(&spec.repo, f).is_file()) {
            return Ok(place);
        }
    }
    let name = spec.repo.replace('/', "--");
    let lock = cache.lock(&name, progress)?;
    let work = cache.partial().join(&name);
    let client = Client::new(&work)?;
    let first = match &spec.file {
        HubFile::Path(file) => file.clone(),
        HubFile::Tag(tag) => choose(&client.files(&spec.repo)?, tag)
            .map_err(|message| PullError::Hub { what: spec.repo.clone(), message })?,
    };
    for file in split_names(&first) {
        let place = cache.hub_path(&spec.repo, &file);
        if place.is_file() {
            continue;
        }
        client.fetch(&spec.repo, &file, None, &place, progress)?;
        progress.finish();
    }
    let _ = fs::remove_dir_all(&work);
    drop(lock);
    Ok(cache.hub_path(&spec.repo, &first))
}

struct Client {
    api: Api,
    work: PathBuf,
}

impl Client {
    fn new(work: &Path) -> Result<Client, PullError> {
        Client::at(work, None)
    }

    /// A client of the hub at `endpoint`, else of the one that the environment names.
    fn at(work: &Path, endpoint: Option<String>) -> Result<Client, PullError> {
        fs::create_dir_all(work).map_err(PullError::io(work, 0))?;
        let mut builder = ApiBuilder::from_env();
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let api = builder
            .with_cache_dir(work.to_path_buf())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("kinglet", env!("CARGO_PKG_VERSION"))
            .build();
        let api = api.map_err(|e| PullError::Hub { what: "client".into(), message: e.to_string() })?;
        Ok(Client { api, work: work.to_path_buf() })
    }

    /// Every file of a repository.
    fn files(&self, repo: &str) -> Result<Vec<String>, PullError> {
        let info = self.api.model(repo.into()).info().map_err(|e| explain(repo, e))?;
        Ok(info.siblings.into_iter().map(|s| s.rfilename).collect())
    }

    fn fetch(
        &self,
        repo: &str,
        file: &str,
        sha256: Option<&str>,
        place: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), PullError> {
        let what = format!("{repo}/{file}");
        let remote = self.api.model(repo.into());
        let meta = self.api.metadata(&remote.url(file)).map_err(|e| explain(&what, e))?;
        let size = meta.size() as u64;
        let got = remote.download_with_progress(file, Bytes { progress: &mut *progress, at: 0 });
        let pointer = match got {
            Ok(pointer) => pointer,
            Err(e) => {
                if disk_full(&e) {
                    return Err(PullError::DiskFull { path: self.work.clone(), needed: size });
                }
                // A partial file that is already whole, or too long, can only fail again: start afresh next time.
                if matches!(e, ApiError::InvalidResume) || e.to_string().contains("416") {
                    let _ = fs::remove_dir_all(&self.work);
                }
                return Err(explain(&what, e));
            }
        };
        let real = fs::canonicalize(&pointer).map_err(PullError::io(&pointer, 0))?;
        // The hub's entity tag of a large file is its SHA-256.
        let listed = (meta.etag().len() == 64).then(|| meta.etag().to_string());
        if let Some(expected) = sha256.map(String::from).or(listed) {
            progress.message(&format!("checking {file}"));
            let found = sha256_of(&real, &mut |_| {})?;
            if found != expected {
                let _ = fs::remove_dir_all(&self.work);
                return Err(PullError::Mismatch { what, expected, found });
            }
        }
        install(&real, place)
    }
}

/// `hf-hub` counts bytes from a start that it may repeat after a broken connection; the bar must not.
struct Bytes<'a> {
    progress: &'a mut dyn Progress,
    at: u64,
}

impl hf_hub::api::Progress for Bytes<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.progress.begin(&format!("fetching {filename}"), size as u64);
        self.at = 0;
    }
    fn update(&mut self, bytes: usize) {
        self.at += bytes as u64;
        self.progress.advance(bytes as u64);
    }
    fn finish(&mut self) {}
}

fn disk_full(error: &ApiError) -> bool {
    match error {
        ApiError::IoError(e) => matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded),
        ApiError::TooManyRetries(e) => disk_full(e),
        _ => false,
    }
}

/// What went wrong, with what a user can do about it.
fn explain(what: &str, error: ApiError) -> PullError {
    let text = error.to_string();
    let hint = if text.contains("401") || text.contains("403") {
        " (the repository is private or gated, or does not exist: accept its terms on the hub and store a token with `hf auth login`)"
    } else if text.contains("404") {
        " (no such repository or file)"
    } else if text.contains("416") {
        " (the partial file did not fit and was removed: pull again)"
    } else {
        " (is the hub reachable from here? HF_ENDPOINT can name a mirror)"
    };
    PullError::Hub { what: what.into(), message: format!("{text}{hint}") }
}

/// The GGUF file among `files` with `tag` as a word of its name; of a split model the first file.
fn choose(files: &[String], tag: &str) -> Result<String, String> {
    let usable =
        |f: &&String| f.ends_with(".gguf") && !f.to_lowercase().contains("mmproj") && f.split('/').all(safe_component);
    let models: Vec<&String> = files.iter().filter(usable).collect();
    let mut found: Vec<&String> = models
        .iter()
        .copied()
        .filter(|f| f.trim_end_matches(".gguf").split(['-', '.', '/']).any(|word| word.eq_ignore_ascii_case(tag)))
        .collect();
    found.sort_by_key(|f| (f.len(), f.as_str()));
    match found.first() {
        Some(file) => Ok(split_names(file).into_iter().next().unwrap_or_else(|| file.to_string())),
        None if models.is_empty() => Err("the repository has no .gguf file".into()),
        None => {
            let names: Vec<&str> = models.iter().take(40).map(|s| s.as_str()).collect();
            Err(format!("no file for {tag}; it has {}", names.join(", ")))
        }
    }
}

/// All files of the model that `file` belongs to: itself, or `x-00001-of-0000N.gguf` and its siblings.
fn split_names(file: &str) -> Vec<String> {
    let one = || vec![file.to_string()];
    let Some(stem) = file.strip_suffix(".gguf") else { return one() };
    let Some((head, count)) = stem.rsplit_once("-of-") else { return one() };
    let Some((base, number)) = head.rsplit_once('-') else { return one() };
    if number.len() != 5 || count.len() != 5 || number.parse::<u32>().is_err() {
        return one();
    }
    match count.parse::<u32>() {
        Ok(n) if (1..=999).contains(&n) => (1..=n).map(|i| format!("{base}-{i:05}-of-{n:05}.gguf")).collect(),
        _ => one(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Silent;
    use super::super::tests::{content, hash, scratch};
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    /// A hub of one repository that breaks off the first answer with a body half way.
    fn hub(file: &'static str, bytes: Vec<u8>, etag: String) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut broken = false;
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = lines.next().unwrap_or_default();
                let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).map(|l| l.to_lowercase()).collect();
                let path = request.split(' ').nth(1).unwrap_or_default().to_string();
                if path == "/api/models/o/r/revision/main" || path == "/api/models/o/r" {
                    let body = format!(r#"{{"siblings":[{{"rfilename":"{file}"}}],"sha":"abc"}}"#);
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
                    let _ = write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                } else if path == format!("/o/r/resolve/main/{file}") {
                    let range =
                        headers.iter().find_map(|h| h.strip_prefix("range: bytes=")).unwrap_or("0-").to_string();
                    let (from, to) = range.split_once('-').unwrap();
                    let from: usize = from.parse().unwrap();
                    let to = to.parse().map_or(bytes.len(), |t: usize| t + 1);
                    let part = &bytes[from..to];
                    let _ = write!(
                        stream,
                        "HTTP/1.1 206 Partial Content\r\nconnection: close\r\nx-repo-commit: abc\r\netag: \"{etag}\"\r\n\
                         content-range: bytes {from}-{}/{}\r\ncontent-length: {}\r\n\r\n",
                        to - 1,
                        bytes.len(),
                        part.len()
                    );
                    let half = part.len() > 1 && !std::mem::replace(&mut broken, true);
                    let _ = stream.write_all(if half { &part[..part.len() / 2] } else { part });
                } else {
                    let _ = write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                }
            }
        });
        address
    }

    fn get(name: &str, etag: String, sha256: Option<&str>, bytes: &[u8]) -> (Cache, Result<(), PullError>) {
        let cache = Cache::at(scratch(name));
        let endpoint = hub("m.Q4_0.gguf", bytes.to_vec(), etag);
        let client = Client::at(&cache.partial().join("w"), Some(endpoint)).unwrap();
        assert_eq!(client.files("o/r").unwrap(), ["m.Q4_0.gguf"]);
        let place = cache.hub_path("o/r", "m.Q4_0.gguf");
        let result = client.fetch("o/r", "m.Q4_0.gguf", sha256, &place, &mut Silent);
        (cache, result)
    }

    #[test]
    fn a_broken_connection_is_taken_up_again() {
        let bytes = content(5, 300_000);
        let (cache, result) = get("hub-ok", hash(&bytes).into(), None, &bytes);
        result.unwrap();
        assert_eq!(std::fs::read(cache.hub_path("o/r", "m.Q4_0.gguf")).unwrap(), bytes);
        assert_eq!(cache.list().unwrap()[0].name, "o/r/m.Q4_0.gguf");
    }

    #[test]
    fn bytes_other_than_those_stated_are_refused() {
        let bytes = content(6, 1000);
        for (etag, sha256) in [("0".repeat(64), None), ("short".into(), Some("1".repeat(64)))] {
            let (cache, result) = get("hub-bad", etag, sha256.as_deref(), &bytes);
            assert!(matches!(result, Err(PullError::Mismatch { .. })), "{result:?}");
            assert!(cache.list().unwrap().is_empty());
        }
    }

    #[test]
    fn a_missing_file_is_explained() {
        let cache = Cache::at(scratch("hub-404"));
        let client = Client::at(&cache.partial(), Some(hub("a.gguf", vec![1], String::new()))).unwrap();
        let e = client.fetch("o/r", "b.gguf", None, &cache.hub_path("o/r", "b.gguf"), &mut Silent).unwrap_err();
        assert!(e.to_string().contains("no such repository or file"), "{e}");
    }

    #[test]
    fn choosing_by_tag() {
        let files: Vec<String> = ["README.md", "m-Q4_K_M.gguf", "m.Q4_K.gguf", "mmproj-Q8_0.gguf", "../m-Q8_0.gguf"]
            .map(String::from)
            .into();
        assert_eq!(choose(&files, "q4_k_m").unwrap(), "m-Q4_K_M.gguf");
        assert_eq!(choose(&files, "Q4_K").unwrap(), "m.Q4_K.gguf");
        assert!(choose(&files, "Q8_0").unwrap_err().contains("m-Q4_K_M.gguf"));
        let split: Vec<String> = (1..=2).map(|i| format!("q/m-Q4_0-0000{i}-of-00002.gguf")).rev().collect();
        assert_eq!(choose(&split, "Q4_0").unwrap(), "q/m-Q4_0-00001-of-00002.gguf");
        assert!(choose(&[], "Q4_0").is_err());
    }

    #[test]
    fn split_models_come_whole() {
        assert_eq!(split_names("a.gguf"), ["a.gguf"]);
        assert_eq!(
            split_names("a-00002-of-00003.gguf"),
            ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf"]
        );
    }
}
