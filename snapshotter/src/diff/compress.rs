//! Compresses a layer on several processors.
//!
//! ```text
//! chunk 0   chunk 1   chunk 2        up to 1 MiB each (chunks.rs)
//!    |         |         |
//! member 0  member 1  member 2       gzip: RFC 1952 section 2.2, a file is a series of members
//!                                    zstd: RFC 8878 section 3.1, of frames
//! ```
//!
//! Blocks that stand by themselves cost less than one part in a hundred in size. Readers of layers
//! take such series: Go's compress/gzip and klauspost's zstd (containerd, Docker, podman), GNU gzip,
//! igzip. The result depends on the input alone, not on how many processors there are.

use std::io::{self, Write};
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use flate2::write::GzEncoder;
use transship_layer::Compression;

use super::chunks::gone;

/// More threads than these compress faster than anything that follows can take.
const MAX_WORKERS: usize = 8;
/// What zstd itself and containerd's writer take by default.
const ZSTD_LEVEL: i32 = 3;

/// Sampling before gzip: how many pieces of which size are tried of each chunk.
const SAMPLES: usize = 16;
const SAMPLE_BYTES: usize = 2 << 10;
/// A chunk is stored when gzip would save less than one part in this number.
const WORTH: usize = 50;

type Block = io::Result<Vec<u8>>;

/// Compresses each chunk to a block, in parallel, and sends the blocks in the order of the chunks.
///
/// # Errors
/// When compression fails or the receiver of the blocks is gone.
pub(super) fn compress_blocks(
    compression: Compression,
    chunks: Receiver<Vec<u8>>,
    blocks: &SyncSender<Vec<u8>>,
) -> io::Result<()> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let workers = workers.min(MAX_WORKERS);
    let (jobs, queue) = sync_channel::<(Vec<u8>, SyncSender<Block>)>(0);
    let queue = Mutex::new(queue);
    // The order of the blocks; its length bounds how many are in memory.
    let (promises, promised) = sync_channel::<Receiver<Block>>(workers);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut count = 0;
            for chunk in chunks {
                let (done, block) = sync_channel(1);
                if promises.send(block).is_err() || jobs.send((chunk, done)).is_err() {
                    return;
                }
                count += 1;
            }
            if count == 0 {
                // An empty input is still a file of its format.
                let (done, block) = sync_channel(1);
                drop(done.send(compress_block(compression, &[])));
                drop(promises.send(block));
            }
        });
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let job = queue.lock().ok().and_then(|queue| queue.recv().ok());
                    let Some((chunk, done)) = job else { return };
                    // Nobody waits for it any more when the order was given up.
                    drop(done.send(compress_block(compression, &chunk)));
                }
            });
        }
        send_in_order(promised, blocks)
    })
}

fn send_in_order(
    promised: Receiver<Receiver<Block>>,
    blocks: &SyncSender<Vec<u8>>,
) -> io::Result<()> {
    for block in promised {
        blocks.send(block.recv().map_err(gone)??).map_err(gone)?;
    }
    Ok(())
}

fn compress_block(compression: Compression, chunk: &[u8]) -> Block {
    match compression {
        Compression::None => Ok(chunk.to_vec()),
        Compression::Gzip => {
            let level = match compresses(chunk)? {
                true => flate2::Compression::default(),
                false => flate2::Compression::none(),
            };
            gzip(chunk, level)
        }
        Compression::Zstd => zstd::bulk::compress(chunk, ZSTD_LEVEL),
    }
}

fn gzip(bytes: &[u8], level: flate2::Compression) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 2), level);
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Whether compression is worth its time, by a sample from all over the chunk. Much of what
/// containers write is compressed already (archives, pictures, databases), and deflate takes longest
/// for what it cannot make smaller.
fn compresses(chunk: &[u8]) -> io::Result<bool> {
    let step = chunk.len() / SAMPLES;
    if step < 2 * SAMPLE_BYTES {
        return Ok(true);
    }
    let sample: Vec<u8> = chunk
        .chunks_exact(step)
        .flat_map(|part| &part[..SAMPLE_BYTES])
        .copied()
        .collect();
    // The lowest level that makes a code table of its own: level 1 of zlib-rs stores what mostly is
    // noise, and would hide the rest of it.
    let packed = gzip(&sample, flate2::Compression::new(2))?;
    Ok(packed.len() < sample.len() - sample.len() / WORTH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    use proptest::prelude::*;

    fn compressed(compression: Compression, chunks: &[Vec<u8>]) -> Vec<u8> {
        thread::scope(|scope| {
            let (input, queue) = sync_channel(1);
            let (blocks, output) = sync_channel(1);
            scope.spawn(move || {
                for chunk in chunks {
                    input.send(chunk.clone()).unwrap();
                }
            });
            scope.spawn(move || compress_blocks(compression, queue, &blocks).unwrap());
            output.into_iter().flatten().collect()
        })
    }

    #[test]
    fn what_cannot_become_smaller_is_stored() {
        let mut state = 1_u32;
        let mut noise = move |len: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                // xorshift32
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state.to_le_bytes()[0]
            })
            .take(len)
            .collect()
        };
        let len = 1 << 20;
        let random = noise(len);
        assert!(!compresses(&random).unwrap());
        let block = compress_block(Compression::Gzip, &random).unwrap();
        assert!((len..len + 200).contains(&block.len()), "{}", block.len());
        let mut read = Vec::new();
        flate2::read::GzDecoder::new(&block[..])
            .read_to_end(&mut read)
            .unwrap();
        assert_eq!(read, random);
        // A tenth of it text, wherever it is.
        for at in [0, len / 2, len - len / 10] {
            let mut mixed = random.clone();
            mixed[at..at + len / 10].fill(b'a');
            assert!(compresses(&mixed).unwrap(), "at {at}");
        }
        assert!(compresses(&noise(1000)).unwrap(), "too short to tell");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn blocks_are_read_as_one(sizes in prop::collection::vec(1_usize..5_000, 0..40)) {
            let mut byte = 0_u8;
            let chunks: Vec<Vec<u8>> = sizes
                .iter()
                .map(|size| {
                    byte = byte.wrapping_add(1);
                    (0..*size).map(|n| if n % 3 == 0 { byte } else { n.to_le_bytes()[0] }).collect()
                })
                .collect();
            for compression in [Compression::Gzip, Compression::Zstd] {
                let packed = compressed(compression, &chunks);
                prop_assert_eq!(&packed, &compressed(compression, &chunks));
                let mut reader = transship_layer::decompress(&packed[..]).unwrap();
                prop_assert_eq!(reader.compression(), compression);
                let mut read = Vec::new();
                reader.read_to_end(&mut read).unwrap();
                prop_assert_eq!(read, chunks.concat());
            }
        }
    }

    #[test]
    fn a_receiver_that_leaves_ends_the_work() {
        let (input, queue) = sync_channel(1);
        let (blocks, output) = sync_channel(1);
        drop(output);
        thread::scope(|scope| {
            let worker = scope.spawn(move || compress_blocks(Compression::Gzip, queue, &blocks));
            while input.send(vec![1; 1000]).is_ok() {}
            assert!(worker.join().unwrap().is_err());
        });
    }
}
