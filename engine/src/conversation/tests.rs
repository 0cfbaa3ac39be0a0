use std::io;

use super::*;
use crate::data_channel::Identity;

fn nobody() -> Interrupt {
    Interrupt::never()
}

#[tokio::test]
async fn a_silent_link_ends_a_step() {
    let (silent, _held) = io::pipe().unwrap();
    let (_full, output) = io::pipe().unwrap();
    let mut conversation = Conversation::new(silent, output, nobody());
    conversation.watch(Duration::from_millis(300)).unwrap();
    let error = conversation.receive("the copy").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Target);
    assert!(error.to_string().contains("silent"), "{error}");
    let error = conversation.receive("the copy").await.unwrap_err();
    assert!(error.to_string().contains("given up"), "{error}");
}

#[tokio::test]
async fn who_only_sends_is_told_nothing_and_not_waited_for() {
    let (silent, _held) = io::pipe().unwrap();
    let (mut told, output) = io::pipe().unwrap();
    let mut conversation = Conversation::new(silent, output, nobody());
    conversation.wait_at_most(Duration::from_millis(300));
    let error = conversation.receive("a file").await.unwrap_err();
    assert!(error.to_string().contains("silent"), "{error}");
    drop(conversation);
    let mut said = Vec::new();
    io::Read::read_to_end(&mut told, &mut said).unwrap();
    assert!(said.is_empty(), "{said:?}");
}

#[tokio::test]
async fn a_pipe_that_nobody_reads_ends_a_step() {
    let (input, _held) = io::pipe().unwrap();
    let (_full, output) = io::pipe().unwrap();
    let mut conversation = Conversation::new(input, output, nobody());
    conversation.watch(Duration::from_millis(300)).unwrap();
    let flood = |sender: &Writing| sender.send_blob(&vec![0; 4 << 20]);
    let error = conversation.write(flood).await.unwrap_err();
    assert!(error.to_string().contains("silent"), "{error}");
}

#[tokio::test]
async fn a_file_that_cannot_be_taken_is_told_at_once() {
    let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
    let here = [std::net::Ipv4Addr::LOCALHOST.into()];
    let listener = target.listen(&here, source.public(), 2).unwrap();
    let addresses = listener.addresses().unwrap();
    let accepting = std::thread::spawn(|| listener.accept());
    let _sending = source.connect(&addresses, target.public(), 2).unwrap();
    let (silent, _held) = io::pipe().unwrap();
    let (_read, output) = io::pipe().unwrap();
    let mut conversation = Conversation::new(silent, output, nobody());
    conversation.watch(Duration::from_secs(20)).unwrap();
    conversation.receive_files_through(accepting.join().unwrap().unwrap());
    let full = |_: &mut Reading| Err(WireError::TooLarge { limit: 7 });
    let error = conversation.read_files(full).await.unwrap_err();
    assert!(error.to_string().contains("more than 7 bytes"), "{error}");
}

/// Two ends of so many connections.
fn connections(streams: usize) -> (Connections, Connections) {
    let (source, target) = (Identity::new().unwrap(), Identity::new().unwrap());
    let here = [std::net::Ipv4Addr::LOCALHOST.into()];
    let listener = target.listen(&here, source.public(), streams).unwrap();
    let addresses = listener.addresses().unwrap();
    let accepting = std::thread::spawn(|| listener.accept());
    let sending = source
        .connect(&addresses, target.public(), streams)
        .unwrap();
    (sending, accepting.join().unwrap().unwrap())
}

/// Sends files, of which nobody takes those of the first connection, and gives how that ends.
async fn send_to_nobody(is_alive: bool) -> Error {
    let patience = Duration::from_millis(900);
    let (here, there) = (io::pipe().unwrap(), io::pipe().unwrap());
    let mut a = Conversation::new(here.0, there.1, nobody());
    let mut b = Conversation::new(there.0, here.1, nobody());
    a.watch(patience).unwrap();
    if is_alive {
        b.watch(patience).unwrap();
    }
    let (sending, _unread) = connections(2);
    a.send_files_through(sending).unwrap();
    let first = Arc::new(AtomicBool::new(is_alive));
    let (waits, waiting) = (Arc::new(AtomicBool::new(true)), Duration::from_millis(50));
    let waited = Arc::clone(&waits);
    let step = move |sender: &Writing| {
        if first.swap(false, Ordering::Relaxed) {
            return sender.send_blob(&vec![0; 64 << 20]);
        }
        while waited.load(Ordering::Relaxed) {
            std::thread::sleep(waiting);
        }
        Ok(())
    };
    let sent = tokio::time::timeout(Duration::from_secs(20), a.write_files(step)).await;
    waits.store(false, Ordering::Relaxed);
    a.close();
    sent.expect("it is not waited for for ever").unwrap_err()
}

#[tokio::test]
async fn a_connection_that_is_stuck_is_not_kept_alive_by_another() {
    // Whoever sees it first, this side or the kernel.
    let error = send_to_nobody(true).await.one_line();
    let is_seen = ["silent", "timed out"].iter().any(|it| error.contains(it));
    assert!(is_seen, "{error}");
}

#[tokio::test]
async fn who_sends_files_hears_that_the_pipe_is_silent() {
    let error = send_to_nobody(false).await;
    assert!(error.to_string().contains("silent"), "{error}");
}

#[tokio::test]
async fn a_message_that_comes_while_files_are_sent_is_kept() {
    let (here, there) = (io::pipe().unwrap(), io::pipe().unwrap());
    let mut a = Conversation::new(here.0, there.1, nobody());
    let mut b = Conversation::new(there.0, here.1, nobody());
    a.watch(LINK_PATIENCE).unwrap();
    let (sending, _unread) = connections(2);
    a.send_files_through(sending).unwrap();
    let wait = |_: &Writing| {
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    };
    b.send(Message::Restored).await.unwrap();
    a.write_files(wait).await.unwrap();
    a.write_data(wait).await.unwrap();
    assert_eq!(a.receive("the copy").await.unwrap(), Message::Restored);
    b.give_up("a disk is full".to_owned()).await;
    let error = a.write_files(wait).await.unwrap_err();
    assert!(error.to_string().contains("a disk is full"), "{error}");
}

#[tokio::test]
async fn a_side_that_only_asks_is_not_waited_for() {
    let (here, there) = (io::pipe().unwrap(), io::pipe().unwrap());
    let mut a = Conversation::new(here.0, there.1, nobody());
    let mut b = Conversation::new(there.0, here.1, nobody());
    let deadline = Duration::from_millis(500);
    let waits = a.receive_from_waiting("the copy", deadline);
    let asks = async {
        while b.send(Message::Waiting).await.is_ok() && b.receive("a word").await.is_ok() {}
    };
    let error = tokio::select! {
        heard = waits => heard.unwrap_err(),
        () = asks => panic!("it is told to go on"),
        () = tokio::time::sleep(Duration::from_secs(20)) => panic!("it is waited for for ever"),
    };
    assert!(error.to_string().contains("the copy has taken"), "{error}");
}

#[tokio::test]
async fn a_side_that_works_is_waited_for() {
    let (here, there) = (io::pipe().unwrap(), io::pipe().unwrap());
    let mut a = Conversation::new(here.0, there.1, nobody());
    let mut b = Conversation::new(there.0, here.1, nobody());
    let patience = Duration::from_millis(600);
    a.watch(patience).unwrap();
    b.watch(patience).unwrap();
    let work = async {
        tokio::time::sleep(patience * 3).await;
        b.send(Message::Restored).await
    };
    let (heard, sent) = tokio::join!(a.receive("the copy"), work);
    sent.unwrap();
    assert_eq!(heard.unwrap(), Message::Restored);
    let deadline = a.receive_within("the copy", patience, Duration::ZERO).await;
    assert!(deadline.unwrap_err().to_string().contains("more than"));
}
