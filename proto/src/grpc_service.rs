//! A gRPC service of a tonic server, made of calls that are plain async functions.
//!
//! ```text
//! POST /<NAME>/<method>  ──> GrpcServer ──> Methods::answer ──> unary | server_streaming | client_streaming
//!                                                                 │ protobuf in, protobuf out
//!                                                                 └──> the call
//! ```
//!
//! What tonic's code generator would write for each service, once for all of them.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use prost::Message;
use tonic::body::Body;
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{
    ClientStreamingService, Grpc, NamedService, ServerStreamingService, UnaryService,
};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// containerd's own limit for messages, in bytes.
const MAX_MESSAGE: usize = 16 << 20;

type HttpRequest = http::Request<Body>;
type HttpResponse = http::Response<Body>;

/// Messages on their way out.
pub type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// The calls of one service.
pub trait Methods: Send + Sync + 'static {
    /// Package and name of the service.
    const NAME: &'static str;

    /// Answers one call; `method` is its name without the service's.
    fn answer(
        &self,
        method: &str,
        request: HttpRequest,
    ) -> impl Future<Output = HttpResponse> + Send;
}

/// [`Methods`] as a service of a tonic server.
#[derive(Debug)]
pub struct GrpcServer<M>(Arc<M>);

impl<M> GrpcServer<M> {
    pub(crate) fn of(methods: M) -> Self {
        Self(Arc::new(methods))
    }
}

impl<M> Clone for GrpcServer<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M: Methods> NamedService for GrpcServer<M> {
    const NAME: &'static str = M::NAME;
}

impl<M: Methods> Service<HttpRequest> for GrpcServer<M> {
    type Response = HttpResponse;
    type Error = Infallible;
    type Future = BoxFuture<HttpResponse, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest) -> Self::Future {
        let methods = Arc::clone(&self.0);
        Box::pin(async move {
            let path = request.uri().path().to_owned();
            let method = path
                .strip_prefix('/')
                .and_then(|path| path.strip_prefix(M::NAME)?.strip_prefix('/'));
            Ok(methods.answer(method.unwrap_or_default(), request).await)
        })
    }
}

/// The answer to a call that the service does not have.
pub(crate) fn no_method(request: &HttpRequest) -> HttpResponse {
    Status::unimplemented(format!("there is no method {}", request.uri().path())).into_http()
}

/// One message in, one out.
pub(crate) async fn unary<Q, A, F>(
    request: HttpRequest,
    call: impl Fn(Request<Q>) -> F + Send,
) -> HttpResponse
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    grpc().unary(Call(call), request).await
}

/// One message in, a stream of them out. Boxed, because the compiler forgets that the stream is
/// `'static` when it looks whether the caller's future can be sent (rust issue 102211).
pub(crate) fn server_streaming<'c, Q, A, F>(
    request: HttpRequest,
    call: impl Fn(Request<Q>) -> F + Send + 'c,
) -> Pin<Box<dyn Future<Output = HttpResponse> + Send + 'c>>
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    F: Future<Output = Result<Answers<A>, Status>> + Send + 'static,
{
    Box::pin(async move { grpc().server_streaming(Call(call), request).await })
}

/// A stream of messages in, one out.
pub(crate) async fn client_streaming<Q, A, F>(
    request: HttpRequest,
    call: impl Fn(Request<Streaming<Q>>) -> F + Send,
) -> HttpResponse
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    grpc().client_streaming(Call(call), request).await
}

fn grpc<A, Q>() -> Grpc<ProstCodec<A, Q>>
where
    A: Message + 'static,
    Q: Message + Default + 'static,
{
    Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_MESSAGE)
}

/// A function as what tonic calls.
struct Call<C>(C);

impl<C, Q, A, F> UnaryService<Q> for Call<C>
where
    C: Fn(Request<Q>) -> F,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    type Response = A;
    type Future = BoxFuture<Response<A>, Status>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let answer = self.0(request);
        Box::pin(async move { answer.await.map(Response::new) })
    }
}

impl<C, Q, A, F> ServerStreamingService<Q> for Call<C>
where
    C: Fn(Request<Q>) -> F,
    A: 'static,
    F: Future<Output = Result<Answers<A>, Status>> + Send + 'static,
{
    type Response = A;
    type ResponseStream = Answers<A>;
    type Future = BoxFuture<Response<Answers<A>>, Status>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let answer = self.0(request);
        Box::pin(async move { answer.await.map(Response::new) })
    }
}

impl<C, Q, A, F> ClientStreamingService<Q> for Call<C>
where
    C: Fn(Request<Streaming<Q>>) -> F,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    type Response = A;
    type Future = BoxFuture<Response<A>, Status>;

    fn call(&mut self, request: Request<Streaming<Q>>) -> Self::Future {
        let answer = self.0(request);
        Box::pin(async move { answer.await.map(Response::new) })
    }
}
